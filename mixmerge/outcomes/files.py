"""Lines, JSON, CSV and Parquet from disk. Faults name the file, the line and the column."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mixmerge.errors import DependencyError, Fault, MixmergeError

MAX_LINE = 100_000_000  # bytes; a longer one is no row of a table
MOST = 20  # faults of one file that are told; of more, how many
_BOM = b"\xef\xbb\xbf"
_MISSING = frozenset({"", "nan", "null", "none"})
_TRUTH = {"true": 1.0, "false": 0.0}


class Place(NamedTuple):
    """Where something is in a file: ``file, line 3``."""

    path: Path
    row: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}, {self.unit} {self.row}"

    def column(self, name: str) -> str:
        """``file, line 3, column score``."""
        return f"{self}, column {name}"


class Faults:
    """What is wrong with one file, to be told at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: list[Fault] = []
        self._more = 0

    def add(self, where: Place | str, what: str, allowed: str = "", run: str = "") -> None:
        if len(self._found) < MOST:
            self._found.append(Fault(str(where), what, allowed, run))
        else:
            self._more += 1

    def check(self) -> None:
        """Raise what was found, if anything."""
        if self._found:
            more = [Fault(str(self.path), f"{self._more:,} more faults like these")] if self._more else []
            raise MixmergeError([*self._found, *more])


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes.

    Raises:
        MixmergeError: it is not there, a folder, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise MixmergeError(Fault(str(path), "does not exist")) from error
    except IsADirectoryError as error:
        raise MixmergeError(Fault(str(path), "is a folder", "A file")) from error
    except OSError as error:
        raise MixmergeError(Fault(str(path), f"cannot be read: {error.strerror or error}")) from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line with its number from 1 and its end.

    Raises:
        MixmergeError: a line is not UTF-8 or longer than ``MAX_LINE`` bytes.
    """
    with opened(path) as file:
        for number in itertools.count(1):
            raw = file.readline(MAX_LINE + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE:
                raise MixmergeError(
                    Fault(str(Place(path, number)), f"is longer than {MAX_LINE:,} bytes", "One row a line")
                )
            raw = raw.removeprefix(_BOM) if number == 1 else raw
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise MixmergeError(
                    Fault(
                        str(Place(path, number)),
                        f"is not UTF-8 at byte {error.start + 1}",
                        run="Save the file as UTF-8",
                    )
                ) from error


def parsed(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no whole JSON value: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON that can be read: {error}") from error


def objects(path: Path, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their lines. Lines that hold none are faults; blank ones are passed over."""
    for number, text in lines(path):
        if not text.strip():
            continue
        try:
            value = parsed(text)
        except ValueError as error:
            faults.add(Place(path, number), str(error), "One JSON object a line")
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            faults.add(Place(path, number), f"is {_kind(value)}", "One JSON object a line")


def document(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        MixmergeError: it is not JSON, or not UTF-8.
    """
    text = "".join(line for _, line in lines(path))
    if not text.strip():
        raise empty(path)
    try:
        return parsed(text)
    except ValueError as error:
        raise MixmergeError(Fault(str(path), str(error), run="Was it cut off?")) from error


def empty(path: Path) -> MixmergeError:
    return MixmergeError(Fault(str(path), "is empty", "Outcomes of at least one query"))


def table_of(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Column names of a CSV file, and its rows with the line each begins at.

    Raises:
        MixmergeError: it is empty, a column is there twice, a row is longer or shorter than the header, a quote is
            left open.
    """
    rows = _csv_rows(path)
    try:
        _, names = next(rows)
    except StopIteration as error:
        raise empty(path) from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MixmergeError(Fault(str(Place(path, 1)), f"has the column {', '.join(map(repr, twice))} twice"))
    return names, _of_width(path, rows, len(names))


def _of_width(
    path: Path, rows: Iterator[tuple[int, list[str]]], width: int
) -> Iterator[tuple[int, list[str]]]:
    for line, row in rows:
        if len(row) != width:
            raise MixmergeError(
                Fault(
                    str(Place(path, line)),
                    f"has {len(row)} cells",
                    f"The header has {width} columns",
                    "Was it cut off?",
                )
            )
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((text for _, text in lines(path)), strict=True)
    while True:
        start = reader.line_num + 1
        # The limit is the csv module's own and 131,072 characters by default: prompts are longer. It is put back
        # at once, for whoever else reads CSV in this process.
        before = csv.field_size_limit(MAX_LINE)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise MixmergeError(
                Fault(str(Place(path, start)), f"is no row of CSV: {error}", run="Was it cut off?")
            ) from error
        finally:
            csv.field_size_limit(before)
        if row:
            yield start, row


def parquet_of(path: Path, columns: Sequence[str] | None = None) -> Any:
    """The ``pyarrow.Table`` of a Parquet file, or some of its columns."""
    with _parquet_file(path) as file:
        return file.read(columns=None if columns is None else list(columns))


def parquet_schema(path: Path) -> Any:
    """The ``pyarrow.Schema`` of a Parquet file."""
    with _parquet_file(path) as file:
        return file.schema_arrow


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DependencyError(
            Fault(str(path), "needs pyarrow to be read", run="pip install 'mixmerge[route]'")
        ) from error
    with opened(path) as handle:
        try:
            with pyarrow.parquet.ParquetFile(handle) as file:
                yield file
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MixmergeError(
                Fault(str(path), f"is no whole Parquet file: {reason}", run="Was it cut off?")
            ) from error


def number(value: object) -> float:
    """A finite number; NaN where it is missing: None, NaN, or a text like "", ``nan``, ``null``. Booleans are 1 and 0.

    Raises:
        ValueError: says what it is instead.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _MISSING:
            return math.nan
        if word in _TRUTH:
            return _TRUTH[word]
        try:
            given = float("_" if "_" in word else word)  # Python alone takes 1_000 for a number
        except ValueError as error:
            raise ValueError(f"{shown(value)} is no number") from error
    elif isinstance(value, int | float):
        try:
            given = float(value)
        except OverflowError as error:
            raise ValueError("is beyond what a number can hold") from error
    else:
        raise ValueError(f"is {_kind(value)}, no number")
    if math.isinf(given):
        raise ValueError(f"{shown(str(value))} is infinite")
    return given


def shown(text: str, *, most: int = 40) -> str:
    """The text, or its beginning, in quotes."""
    return repr(text if len(text) <= most else text[:most] + "...")


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"{shown(str(value))}"
