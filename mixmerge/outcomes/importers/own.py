"""Our own formats, version 1. Q queries, E experts.

Parquet: one row for each query; text columns ``id``, ``query`` and ``meta.<name>``, and a column of doubles
``<measure>|<expert>`` for each measure and expert, null where missing. The file's metadata has, as JSON under
``mixmerge.outcomes``, what the header of JSONL has.

JSONL: first the header, ``{"format", "version", "rows", "experts", "measures", "metadata", "prices"}``; then an object
for each query: ``id``, ``query``, ``metadata`` by name, and under each measure's name a list in the experts' order,
null where missing. ``rows`` tells a file that was cut off; by hand it may be left out, as may all but ``format``,
``version`` and ``experts``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.building import encodes, wrong_text
from mixmerge.outcomes.files import Faults, Place, number, objects, parquet_of, parsed, shown
from mixmerge.outcomes.glance import Glance, Source, glance
from mixmerge.outcomes.table import MEASURES, Floats, OutcomeTable, Price

FORMAT, VERSION = "mixmerge-outcomes", 1
NOTE = "mixmerge.outcomes"  # key of the header in a Parquet file's metadata
META = "meta."
_KEYS = ("format", "version", "rows", "experts", "measures", "metadata", "prices")


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        experts: names in order.
        measures: of ``MEASURES``; those the file has.
        metadata: names of its columns.
        prices: of some experts.
        rows: how many there are; None if it does not say.
    """

    experts: tuple[str, ...]
    measures: tuple[str, ...]
    metadata: tuple[str, ...]
    prices: Mapping[str, Price]
    rows: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "rows": self.rows,
            "experts": list(self.experts),
            "measures": list(self.measures),
            "metadata": list(self.metadata),
            "prices": {
                name: {"input": price.input, "output": price.output, "size": price.size}
                for name, price in self.prices.items()
            },
        }


def header_of(table: OutcomeTable) -> Header:
    """What the file of a table will say of itself."""
    there = tuple(name for name in MEASURES if getattr(table, name) is not None)
    return Header(table.experts, there, tuple(table.metadata), table.prices, len(table))


def sniff(seen: Glance) -> bool:
    return not seen.folder and (NOTE in seen.notes or seen.first.get("format") == FORMAT)


def read(source: Source) -> OutcomeTable:
    """Read a file of ours.

    Raises:
        MixmergeError: it is of another version, damaged, or cut off; a column is missing or unknown; a value is none.
    """
    return _parquet(source.path) if glance(source.path).shape == "parquet" else _jsonl(source.path)


# --- the header


def _header(given: object, where: str) -> Header:
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise MixmergeError(
            Fault(where, "is no header of outcomes", f'{{"format": "{FORMAT}", "version": ...}}')
        )
    if given.get("version") != VERSION:
        raise MixmergeError(
            Fault(
                where,
                f"is of version {given.get('version')}",
                f"This mixmerge reads version {VERSION}",
                "Write the table again, or update mixmerge",
            )
        )
    faults = [
        Fault(where, f"has the unknown key {shown(key)}", ", ".join(_KEYS))
        for key in given
        if key not in _KEYS
    ]
    experts = _names(given.get("experts"), f"{where}: experts", faults)
    measures = _names(given.get("measures", ["score"]), f"{where}: measures", faults)
    metadata = _names(given.get("metadata", []), f"{where}: metadata", faults)
    faults += [
        Fault(f"{where}: measures", f"{shown(name)} is unknown", ", ".join(MEASURES))
        for name in measures
        if name not in MEASURES
    ]
    if not faults and "score" not in measures:
        faults.append(Fault(f"{where}: measures", "lacks score"))
    if not faults and not experts:
        faults.append(Fault(f"{where}: experts", "is empty", "At least one name"))
    prices = _prices(given.get("prices", {}), f"{where}: prices", faults)
    rows = given.get("rows")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
        faults.append(Fault(f"{where}: rows", f"is {shown(str(rows))}", "How many rows follow"))
    if faults:
        raise MixmergeError(faults)
    return Header(experts, measures, metadata, prices, rows)


def _names(given: object, where: str, faults: list[Fault]) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) and encodes(name) for name in given):
        faults.append(Fault(where, "is no list of names"))
        return ()
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        faults.append(Fault(where, f"{', '.join(map(repr, twice))} is there twice", "Names are unique"))
    return tuple(given)


def _prices(given: Any, where: str, faults: list[Fault]) -> dict[str, Price]:
    prices = {}
    for name, entry in (given if isinstance(given, dict) else {"": given}).items():
        try:
            values = [number(entry[key]) for key in ("input", "output")]
            size = number(entry.get("size"))
            if not all(value >= 0 for value in values) or size < 0:
                raise ValueError("is negative or missing")
        except (TypeError, KeyError, AttributeError, ValueError):
            faults.append(
                Fault(f"{where}: {name}", "is no price", '{"input": 0.2, "output": 0.6, "size": null}')
            )
            continue
        prices[name] = Price(values[0], values[1], None if math.isnan(size) else size)
    return prices


# --- Parquet


def _parquet(path: Path) -> OutcomeTable:
    data = parquet_of(path)
    note = (data.schema.metadata or {}).get(NOTE.encode())
    if note is None:
        raise MixmergeError(
            Fault(str(path), "is no Parquet file of mixmerge", "One that OutcomeTable.write made")
        )
    try:
        header = _header(parsed(note.decode("utf-8")), f"{path}: metadata {NOTE}")
    except (ValueError, UnicodeDecodeError) as error:
        raise MixmergeError(Fault(f"{path}: metadata {NOTE}", str(error))) from error
    wanted = [*("id", "query"), *(f"{META}{name}" for name in header.metadata)]
    wanted += [f"{measure}|{expert}" for measure in header.measures for expert in header.experts]
    faults = [
        Fault(str(path), f"lacks the column {shown(name)}")
        for name in wanted
        if name not in data.column_names
    ]
    unknown = sorted(set(data.column_names) - set(wanted))
    faults += [Fault(str(path), f"has the unknown column {shown(name)}") for name in unknown]
    faults += [Fault(str(path), f"has the column {shown(name)} twice") for name in _twice(data.column_names)]
    if not faults:
        faults += _wrong_types(data, path, texts=2 + len(header.metadata), wanted=wanted)
    if faults:
        raise MixmergeError(faults)
    measured: dict[str, Floats] = {}
    for measure in header.measures:
        columns = [
            data.column(f"{measure}|{expert}").cast("float64", safe=False) for expert in header.experts
        ]
        measured[measure] = np.stack([column.to_numpy() for column in columns], axis=1)
    metadata = {
        name: tuple("" if value is None else value for value in data.column(f"{META}{name}").to_pylist())
        for name in header.metadata
    }
    ids, queries = data.column("id").to_pylist(), data.column("query").to_pylist()
    places = [Place(path, row, "row") for row in range(1, len(ids) + 1)]
    return _made(path, header, ids, queries, metadata, measured, places)


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _wrong_types(data: Any, path: Path, *, texts: int, wanted: Sequence[str]) -> Iterator[Fault]:
    from pyarrow import types

    for at, name in enumerate(wanted):
        kind = data.schema.field(name).type
        text = types.is_string(kind) or types.is_large_string(kind)
        numeric = types.is_floating(kind) or types.is_integer(kind) or types.is_null(kind)
        if (at < texts and not text) or (at >= texts and not numeric):
            yield Fault(f"{path}, column {name}", f"is of type {kind}", "text" if at < texts else "numbers")


# --- JSONL


def _jsonl(path: Path) -> OutcomeTable:
    faults = Faults(path)
    rows = objects(path, faults)
    line, first = next(rows, (1, None))
    faults.check()
    header = _header(first, str(Place(path, line)))
    places: list[Place] = []
    ids: list[Any] = []
    queries: list[Any] = []
    columns: dict[str, list[str]] = {name: [] for name in header.metadata}
    measured: dict[str, list[list[float]]] = {name: [] for name in header.measures}
    known = {"id", "query", "metadata", *header.measures}
    for line, row in rows:
        at = Place(path, line)
        for key in sorted(set(row) - known):
            faults.add(at, f"has the unknown key {shown(key)}", ", ".join(sorted(known)))
        for key in ("id", "query"):
            if key not in row:
                faults.add(at, f"lacks {key}")
        places.append(at)
        ids.append(row.get("id"))
        queries.append(row.get("query"))
        labels = row.get("metadata", {})
        if not isinstance(labels, dict) or set(labels) - set(header.metadata):
            faults.add(
                at.column("metadata"), "does not fit the header", f"Of {list(header.metadata)}, each a text"
            )
            labels = {}
        for name, column in columns.items():
            column.append(_label(labels.get(name), at.column(f"metadata.{name}"), faults))
        for name, values in measured.items():
            values.append(_cells(row.get(name), name, at, len(header.experts), faults))
    faults.check()
    if header.rows is not None and header.rows != len(ids):
        raise MixmergeError(
            Fault(
                str(path), f"holds {len(ids):,} rows", f"Its header says {header.rows:,}", "Was it cut off?"
            )
        )
    arrays = {
        name: np.array(values, np.float64).reshape(-1, len(header.experts))
        for name, values in measured.items()
    }
    metadata = {name: tuple(column) for name, column in columns.items()}
    return _made(path, header, ids, queries, metadata, arrays, places)


def _label(value: object, where: str, faults: Faults) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not encodes(value):
        faults.add(where, f"is {shown(str(value))}", "A text")
        return ""
    return value


def _cells(given: object, measure: str, at: Place, experts: int, faults: Faults) -> list[float]:
    nothing = [math.nan] * experts
    if given is None:
        return nothing
    if not isinstance(given, list) or len(given) != experts:
        faults.add(
            at.column(measure), "does not fit the experts", f"A list of {experts} numbers, null where missing"
        )
        return nothing
    try:
        found = [number(value) for value in given]
        if measure != "score" and any(value < 0 for value in found):
            raise ValueError("holds a negative number")
    except ValueError as error:
        faults.add(at.column(measure), str(error), "Finite numbers, null where missing")
        return nothing
    return found


# --- both


def _made(
    path: Path,
    header: Header,
    ids: Sequence[Any],
    queries: Sequence[Any],
    metadata: Mapping[str, tuple[str, ...]],
    measured: Mapping[str, Floats],
    places: Sequence[Place],
) -> OutcomeTable:
    if not ids:
        raise MixmergeError(Fault(str(path), "holds no outcomes, only a header", "At least one query"))
    faults = Faults(path)
    for at, name, text in zip(places, ids, queries, strict=True):
        if not isinstance(name, str) or not encodes(name):
            faults.add(at.column("id"), "is no text", "A unique text")
        if why := wrong_text(text):
            faults.add(at.column("query"), why, "Text of at least one character that is not a space")
    faults.check()
    try:
        return OutcomeTable(
            ids=tuple(ids),
            queries=tuple(queries),
            experts=header.experts,
            score=measured["score"],
            cost=measured.get("cost"),
            tokens_in=measured.get("tokens_in"),
            tokens_out=measured.get("tokens_out"),
            latency=measured.get("latency"),
            metadata=metadata,
            prices=header.prices,
        )
    except MixmergeError as error:
        raise MixmergeError(
            Fault(f"{path}: {fault.where}", fault.what, fault.allowed, fault.run) for fault in error.faults
        ) from error
