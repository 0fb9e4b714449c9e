"""Files of queries and of decisions: one on each line.

A query is text or JSON: a string, or an object with the text (``text``, ``query``, ``prompt`` or ``question``) and
perhaps a name (``id``, ``query_id`` or ``custom_id``) and an ``embedding``, a list of numbers. Its other texts and
numbers are metadata, as is all of an object ``metadata``; other lists and objects are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.parsing import raw_lines
from mixmerge.decision.records import MAX_CHARACTERS, Decision, Query
from mixmerge.decision.whole import write_whole
from mixmerge.errors import Fault, MixmergeError

TEXT_FIELDS = ("text", "query", "prompt", "question")
ID_FIELDS = ("id", "query_id", "custom_id")
_LINE_BYTES = 4 * MAX_CHARACTERS + 2**20  # of the longest query there may be, and its other fields
_SHOWN = 20  # faults of one file
_JSON, _TEXT = (".jsonl", ".ndjson"), (".txt",)
_OTHERS = (".csv", ".tsv", ".parquet", ".json", ".yaml", ".yml", ".gz")
_FORMATS = "Lines of text (.txt) or of JSON (.jsonl)"


def read_queries(path: str | Path, *, field: str | None = None) -> tuple[Query, ...]:
    """The queries of a file, in its order.

    Args:
        path: ``.jsonl`` or ``.ndjson``: JSON; ``.txt``: text; of any other name: JSON if the first line is an object.
        field: of an object that holds the text, where it has another name than the usual ones.

    Raises:
        MixmergeError: the file cannot be read, or a line is empty, not UTF-8, too long, no query, or has the name of
            another: all at once, each with its line. Empty lines at the end are none.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise MixmergeError(Fault(str(path), f"queries are not read from {suffix} files", _FORMATS))
    is_json = True if suffix in _JSON else False if suffix in _TEXT else None
    try:
        with path.open("rb") as file:
            return parse_queries(file, name=str(path), is_json=is_json, field=field)
    except OSError as error:
        raise MixmergeError(Fault(str(path), f"cannot be read: {error.strerror or error}")) from error


def parse_queries(
    file: BinaryIO, *, name: str, is_json: bool | None = None, field: str | None = None
) -> tuple[Query, ...]:
    """The queries of an open file; ``read_queries`` with ``name`` in place of the path.

    Args:
        is_json: whether lines are JSON; None to tell by the first one.
    """
    found: list[Query] = []
    faults: list[Fault] = []
    named: dict[str, int] = {}  # name that was given -> its line
    blank: list[int] = []  # lines that are empty, if another follows
    for number, line in _lines(file, name=name, faults=faults):
        if not line.strip():
            blank.append(number)
            continue
        faults += [_empty(f"{name}, line {n}") for n in blank]
        blank.clear()
        if is_json is None:
            is_json = line.lstrip().startswith("{")
        try:
            query, own_name = _query(line, is_json=is_json, field=field)
        except MixmergeError as error:
            faults += [
                Fault(f"{name}, line {number}", one.what, one.allowed, one.run) for one in error.faults
            ]
            continue
        if own_name and named.setdefault(query.id, number) != number:
            what = f"{query.id!r} is the name of line {named[query.id]} too"
            faults.append(Fault(f"{name}, line {number}", what, "Names are unique"))
        found.append(query)
    if not found and not faults:
        faults.append(Fault(name, "holds no query", _FORMATS))
    if faults:
        more = len(faults) - _SHOWN
        shown = faults[:_SHOWN]
        raise MixmergeError([*shown, Fault(name, f"and {more:,} more like these")] if more > 0 else shown)
    return tuple(found)


def write_decisions(decisions: Iterable[Decision], path: str | Path, *, overwrite: bool = False) -> int:
    """Write decisions as JSONL, whole or not at all, as they come; returns how many.

    Raises:
        OutputError: the file exists and ``overwrite`` is not set, or it cannot be written.
    """
    lines = (json.dumps(one.as_dict(), ensure_ascii=False).encode("utf-8") + b"\n" for one in decisions)
    return write_whole(Path(path), lines, overwrite=overwrite)


def _empty(where: str) -> Fault:
    return Fault(where, "is empty", "A query on each line", "Delete the line")


def _lines(file: BinaryIO, *, name: str, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines, without their ends; faults of those that are no text."""
    for line in raw_lines(file, most=_LINE_BYTES):
        where = f"{name}, line {line.number}"
        if line.too_long:
            faults.append(Fault(where, f"is longer than {_LINE_BYTES:,} bytes"))
            continue
        try:
            yield line.number, line.text().rstrip("\r\n")
        except UnicodeDecodeError as error:
            faults.append(not_utf8(where, error))


def not_utf8(where: str, error: UnicodeDecodeError) -> Fault:
    what = f"is not UTF-8: byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
    return Fault(where, what, "UTF-8", "Convert the file, as iconv does")


def _query(line: str, *, is_json: bool, field: str | None) -> tuple[Query, bool]:
    """The query of a line, and whether it was given a name."""
    if not is_json:
        return Query(line), False
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MixmergeError(Fault("line", f"is not JSON: {error}", "An object or a string")) from error
    if isinstance(given, str):
        return Query(given), False
    if not isinstance(given, dict):
        what = f"is JSON, but a {type(given).__name__}"
        raise MixmergeError(Fault("line", what, "An object or a string"))
    found = fields_of(given, field=field)
    if not isinstance(found.text, str):
        raise MixmergeError(no_text(given, found, field=field))
    query = Query(
        found.text, id=found.id, metadata=found.metadata, embedding=_embedding(given.get("embedding"))
    )
    return query, bool(found.id)


@dataclass(frozen=True)
class Fields:
    """What an object says of a query.

    Args:
        name: of the field that holds the text, or would.
        text: None if there is none; it may be no text.
        id: "" if there is none.
        metadata: all its other texts and numbers.
    """

    name: str
    text: Any
    id: str
    metadata: dict[str, str]


def fields_of(given: Mapping[str, Any], *, field: str | None) -> Fields:
    """The fields of an object.

    Args:
        field: that holds the text, where it has another name than the usual ones.

    Raises:
        MixmergeError: its id is neither text nor an integer.
    """
    text_name, text = _first(given, (field,) if field else TEXT_FIELDS)
    id_name, own_name = _first(given, ID_FIELDS)
    if own_name is not None and (isinstance(own_name, bool) or not isinstance(own_name, str | int)):
        raise MixmergeError(
            Fault("line", f"{id_name} is a {type(own_name).__name__}", "A string or a number")
        )
    used = {text_name, id_name, "embedding", "metadata"}
    inner = given.get("metadata")
    metadata = {
        **_texts({key: value for key, value in given.items() if key not in used}),
        **(_texts(inner) if isinstance(inner, dict) else {}),
    }
    return Fields(text_name, text, "" if own_name is None else str(own_name), metadata)


def no_text(given: Mapping[str, Any], found: Fields, *, field: str | None) -> Fault:
    """Why an object has no text."""
    what = f"has no field {field!r}" if field else "has no text"
    wanted = f"Fields here: {', '.join(given) or 'none'}"
    if found.text is not None:
        what, wanted = f"{found.name} is a {type(found.text).__name__}", "A string"
    return Fault("line", what, wanted, f"Usual names: {', '.join(TEXT_FIELDS)}")


def _first(given: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    name = next((name for name in names if given.get(name) is not None), names[0])
    return name, given.get(name)


def _texts(given: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
        if isinstance(value, str | int | float)
    }


def _embedding(given: Any) -> NDArray[np.float32] | None:
    if given is None:
        return None
    fault = Fault("line", "embedding is not a list of finite numbers", "[0.12, -0.5, ...]")
    numbers = isinstance(given, list) and all(isinstance(x, int | float) for x in given)
    if not numbers or not given:
        raise MixmergeError(fault)
    try:
        values = np.array(given, np.float64)
    except OverflowError as error:
        raise MixmergeError(fault) from error
    if not (np.abs(values) < np.finfo(np.float32).max).all():
        raise MixmergeError(fault)
    return values.astype(np.float32)
