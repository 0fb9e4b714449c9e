"""A first look at a file or folder, by its content and not its name: what formats are told apart by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.files import empty, lines, opened, parquet_schema, parsed, table_of

Shape = Literal["csv", "jsonl", "json", "parquet"]
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
_HEAD = 1_000_000  # bytes of a JSON list that may go by before its first object is over


@dataclass(frozen=True)
class Source:
    """What an importer is to read.

    Args:
        path: a file, or for some formats a folder.
        queries: a file, or a folder of such, that says more of the queries, for formats that have one.
    """

    path: Path
    queries: Path | None = None


@dataclass(frozen=True)
class Glance:
    """What a file looks like; of a folder, its first file.

    Args:
        path: of the file or folder.
        folder: it is a folder.
        shape: of the file.
        columns: of CSV and Parquet; the keys of the first object of JSON and JSONL.
        first: that first object; {} for CSV and Parquet.
        notes: keys of the Parquet file's own metadata.
        trouble: why there is no first object in JSON or JSONL; "" if there is.
    """

    path: Path
    folder: bool
    shape: Shape
    columns: tuple[str, ...] = ()
    first: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    trouble: str = ""


def glance(path: Path) -> Glance:
    """Look at a file or folder.

    Raises:
        MixmergeError: it is not there, empty, a pickle, or not UTF-8 text.
    """
    if not path.is_dir():
        return _look(path, path, folder=False)
    return _look(path, data_files(path, SUFFIXES)[0], folder=True)


def data_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The folder's files of these kinds, by name; hidden ones left out.

    Raises:
        MixmergeError: there is none.
    """
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise MixmergeError(Fault(str(folder), f"cannot be read: {error.strerror or error}")) from error
    found = [path for path in files if path.suffix.lower() in suffixes and path.is_file()]
    if not found:
        raise MixmergeError(Fault(str(folder), "holds no outcomes", f"Files of {', '.join(suffixes)}"))
    return found


def _look(path: Path, file: Path, *, folder: bool) -> Glance:
    with opened(file) as handle:
        head = handle.read(_HEAD)
    if head.startswith(b"PAR1"):
        schema = parquet_schema(file)
        notes = tuple(key.decode("utf-8", "replace") for key in (schema.metadata or {}))
        return Glance(path, folder, "parquet", tuple(schema.names), notes=notes)
    if file.suffix.lower() in _PICKLES or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        raise MixmergeError(
            Fault(
                str(file),
                "is a pickle: reading it would run whatever code it holds",
                "CSV, JSONL or Parquet",
                "Where you trust it, write it as Parquet with pandas: read_pickle(...).to_parquet(...)",
            )
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise empty(file)
    if start.startswith(b"["):
        first, trouble = _first_of_list(start)
        return Glance(path, folder, "json", tuple(first), first, trouble=trouble)
    if start.startswith(b"{"):
        first, trouble = _first_line(file)
        return Glance(path, folder, "jsonl", tuple(first), first, trouble=trouble)
    return Glance(path, folder, "csv", tuple(table_of(file)[0]))


def _first_of_list(head: bytes) -> tuple[dict[str, Any], str]:
    text = head.decode("utf-8", "ignore")
    try:
        value, _ = json.JSONDecoder().raw_decode(text, len(text) - len(text[1:].lstrip()))
    except (ValueError, RecursionError) as error:
        return {}, f"its first entry is no whole JSON value: {error}"
    return _object(value, "its first entry")


def _first_line(path: Path) -> tuple[dict[str, Any], str]:
    text = next(text for _, text in lines(path) if text.strip())
    try:
        return _object(parsed(text), "its first line")
    except ValueError as error:
        return {}, f"its first line {error}"


def _object(value: Any, what: str) -> tuple[dict[str, Any], str]:
    return (value, "") if isinstance(value, dict) else ({}, f"{what} is no JSON object")
