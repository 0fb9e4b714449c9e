"""Outcome tables to files: Parquet or JSONL, as ``mixmerge.outcomes.importers.own`` describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.outcomes.building import encodes, wrong_text
from mixmerge.outcomes.importers.own import META, NOTE, header_of
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.outcomes.whole import whole_file


def write(table: OutcomeTable, path: Path) -> None:
    """Write a table; the file appears, or is replaced, when it is whole. Its folder is made where it is missing.

    Raises:
        MixmergeError: the name ends in neither ``.parquet`` nor ``.jsonl``, or the table is empty or holds a text
            that could not be read again.
        OutputError: the file cannot be written.
    """
    check_ending(path)
    _check(table)
    with whole_file(path) as file:
        (_parquet if path.suffix == ".parquet" else _jsonl)(table, file)


def check_ending(path: Path) -> None:
    """Refuse a name that no table is written to, before there is one.

    Raises:
        MixmergeError: it ends in neither ``.parquet`` nor ``.jsonl``.
    """
    if path.suffix not in (".parquet", ".jsonl"):
        raise MixmergeError(Fault(str(path), f"has the ending {path.suffix!r}", ".parquet or .jsonl"))


def _check(table: OutcomeTable) -> None:
    faults = [
        Fault(f"query {name!r}", why)
        for name, text in zip(table.ids, table.queries, strict=True)
        if (why := wrong_text(text))
    ]
    named = {"ids": table.ids, "experts": table.experts, "metadata": tuple(table.metadata)}
    named |= {f"metadata.{name}": column for name, column in table.metadata.items()}
    faults += [
        Fault(f"outcomes.{what}", "holds text that is not valid Unicode", "What UTF-8 can hold")
        for what, names in named.items()
        if not all(map(encodes, names))
    ]
    if not len(table) or not table.experts:
        faults.append(Fault("outcomes", "is empty", "At least one query and one expert"))
    if faults:
        raise MixmergeError(faults[:20])


def _parquet(table: OutcomeTable, file: BinaryIO) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DependencyError(
            Fault(
                "pyarrow",
                "is needed to write Parquet",
                "JSONL needs nothing",
                "pip install 'mixmerge[route]'",
            )
        ) from error
    header = header_of(table)
    columns: dict[str, Any] = {
        "id": pa.array(table.ids, pa.string()),
        "query": pa.array(table.queries, pa.string()),
    }
    columns |= {f"{META}{name}": pa.array(column, pa.string()) for name, column in table.metadata.items()}
    for measure in header.measures:
        values = getattr(table, measure)
        columns |= {
            f"{measure}|{expert}": pa.array(
                np.ascontiguousarray(values[:, e]), pa.float64(), from_pandas=True
            )
            for e, expert in enumerate(table.experts)
        }
    note = json.dumps(header.as_dict(), ensure_ascii=False).encode("utf-8")
    pq.write_table(pa.table(columns).replace_schema_metadata({NOTE: note}), file, compression="zstd")


def _jsonl(table: OutcomeTable, file: BinaryIO) -> None:
    header = header_of(table)
    file.write(_line(header.as_dict()))
    for q, (name, text) in enumerate(zip(table.ids, table.queries, strict=True)):
        row: dict[str, Any] = {"id": name, "query": text}
        if table.metadata:
            row["metadata"] = {key: column[q] for key, column in table.metadata.items()}
        for measure in header.measures:
            values = getattr(table, measure)[q].tolist()
            row[measure] = [None if value != value else value for value in values]
        file.write(_line(row))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
