"""Cells of a file to a table: what all importers check alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.files import Faults, Place, number, shown
from mixmerge.outcomes.table import MEASURES, Floats, OutcomeTable

MAX_CHARACTERS = 10_000_000  # of a query: what a router takes (``mixmerge.decision.records``)
LABELS = ("task", "category")  # columns that splits and routers rest on: what differs there is a fault


def text_id(text: str) -> str:
    """16 hex digits of the text's hash: the name of a query whose file gives none, as of a ``Query``."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def wrong_text(text: object) -> str:
    """Why that is no query; "" if it is one."""
    if not isinstance(text, str):
        return "is no text"
    if not text.strip():
        return "is empty"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters, more than {MAX_CHARACTERS:,}"
    return "" if encodes(text) else "is not valid Unicode text"


def encodes(text: str) -> bool:
    """It can be written as UTF-8: halves of surrogate pairs, which JSON can hold, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class _Row:
    name: str
    text: str
    at: Place
    metadata: dict[str, str]
    cells: dict[int, tuple[Place, tuple[float, ...]]] = field(default_factory=dict)  # by expert


class Builder:
    """Gathers queries and cells with their places, and all that is wrong with them.

    Args:
        path: of the file or folder, for faults.
        measures: that the format can hold, of ``MEASURES``, ``score`` first.
    """

    def __init__(self, path: Path, measures: Sequence[str] = ("score",)) -> None:
        self.path = path
        self.faults = Faults(path)
        self.measures = tuple(measures)
        self._rows: list[_Row] = []
        self._by_name: dict[str, int] = {}
        self._experts: dict[str, int] = {}
        self._columns: dict[str, None] = {}
        self._differ: set[str] = set()

    def query(
        self,
        at: Place,
        text: object,
        *,
        name: str | None = None,
        metadata: Mapping[str, object] | None = None,
        again: bool = False,
    ) -> int | None:
        """The number of a query; None if it is none, which is a fault.

        Args:
            name: its id; by default ``text_id``.
            metadata: its columns; None is "".
            again: the format names a query once for every expert, so the same one may come again. Otherwise a text
                without id that comes again is another query, ``<id>-2``.
        """
        if why := wrong_text(text):
            self.faults.add(f"{at}, the query", why, "Text of at least one character that is not a space")
            return None
        given = {key: self._plain(at, key, value) for key, value in (metadata or {}).items()}
        self._columns.update(dict.fromkeys(given))
        first = text_id(str(text)) if name is None else self._plain(at, "id", name)
        if first in self._by_name and again:
            return self._joined(self._by_name[first], at, str(text), given)
        if first in self._by_name and name is not None:
            before = self._rows[self._by_name[first]].at
            self.faults.add(at, f"the id {shown(name)} is there already, at {before}", "Ids are unique")
            return None
        unique, count = first, 1
        while unique in self._by_name:
            count += 1
            unique = f"{first}-{count}"
        self._by_name[unique] = len(self._rows)
        self._rows.append(_Row(unique, str(text), at, given))
        return len(self._rows) - 1

    def _joined(self, q: int, at: Place, text: str, metadata: Mapping[str, str]) -> int | None:
        row = self._rows[q]
        if row.text != text:
            self.faults.add(at, f"the id {shown(row.name)} has another query at {row.at}", "One text an id")
            return None
        for key, value in metadata.items():
            before = row.metadata.get(key, "")
            if not before:
                row.metadata[key] = value
            elif value and value != before:
                self._differ.add(key)
                if key in LABELS:
                    what = f"is {shown(value)}, and {shown(before)} at {row.at}"
                    self.faults.add(at.column(key), what, f"One {key} a query")
        return q

    def cell(self, at: Place, query: int, expert: object, values: Mapping[str, object]) -> None:
        """What an expert reached on a query: ``values`` by measure, as the file has them."""
        if not isinstance(expert, str) or not expert.strip() or not encodes(expert):
            self.faults.add(at, "names no expert", "A name")
            return
        known = tuple(self._measured(at, name, values.get(name)) for name in self.measures)
        e = self._experts.setdefault(expert, len(self._experts))
        row = self._rows[query]
        if e in row.cells and not np.array_equal(row.cells[e][1], known, equal_nan=True):
            self.faults.add(
                at,
                f"has other values of {expert} on query {shown(row.name)} than {row.cells[e][0]}",
                "One outcome for each query and expert",
                "Average repeated draws first",
            )
        row.cells.setdefault(e, (at, known))

    def _measured(self, at: Place, measure: str, value: object) -> float:
        try:
            known = number(value)
            if measure != "score" and known < 0:
                raise ValueError(f"{known:g} is negative")
        except ValueError as error:
            allowed = "A finite number" if measure == "score" else "A finite number, 0 or more"
            self.faults.add(at.column(measure), str(error), f"{allowed}, or nothing where it is missing")
            return float("nan")
        return known

    def _plain(self, at: Place, column: str, value: object) -> str:
        if isinstance(value, list | dict):
            text = json.dumps(value, ensure_ascii=False)
        else:
            text = "" if value is None else str(value)
        if not encodes(text):
            self.faults.add(at.column(column), "is not valid Unicode text", "UTF-8")
        return text

    def table(self) -> OutcomeTable:
        """The table: queries and experts in the order they came in.

        Columns of metadata that differ between the experts of a query (answers, notes) say nothing of the query,
        and are left out.

        Raises:
            MixmergeError: all that was wrong, or nothing was there.
        """
        self.faults.check()
        if not self._rows or not self._experts:
            raise MixmergeError(Fault(str(self.path), "holds no outcomes", "At least one query with a score"))
        arrays = {name: np.full((len(self._rows), len(self._experts)), np.nan) for name in self.measures}
        for q, row in enumerate(self._rows):
            for e, (_, known) in row.cells.items():
                for name, value in zip(self.measures, known, strict=True):
                    arrays[name][q, e] = value
        kept = [column for column in self._columns if column not in self._differ]
        found = {name: _known(arrays.get(name)) for name in MEASURES}
        return OutcomeTable(
            ids=tuple(row.name for row in self._rows),
            queries=tuple(row.text for row in self._rows),
            experts=tuple(self._experts),
            score=arrays["score"],
            cost=found["cost"],
            tokens_in=found["tokens_in"],
            tokens_out=found["tokens_out"],
            latency=found["latency"],
            metadata={column: tuple(row.metadata.get(column, "") for row in self._rows) for column in kept},
        )


def _known(values: Floats | None) -> Floats | None:
    return None if values is None or np.isnan(values).all() else values
