"""Long CSV or JSONL: one row for each query and expert.

Columns ``query``, ``expert``, ``score``, and optionally ``id``, ``cost`` (dollars), ``tokens_in``, ``tokens_out``,
``latency`` (seconds); any other is metadata of the query, and left out where it differs between a query's experts.
Without ``id``, rows of the same text are one query. A score or cost that is empty, null or NaN is missing.
LLMRouter's routing rows have the same under other names, and are read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.building import Builder
from mixmerge.outcomes.files import Place, objects, table_of
from mixmerge.outcomes.glance import Glance, Source, glance
from mixmerge.outcomes.table import MEASURES, OutcomeTable

NEEDED = ("query", "expert", "score")
# ours <- theirs, where ours is not there
ALIASES = {
    "query": ("prompt",),
    "expert": ("model", "model_name"),
    "score": ("performance",),
    "tokens_in": ("input_tokens",),
    "tokens_out": ("output_tokens",),
    "latency": ("response_time",),
    "task": ("task_name",),
}


def sniff(seen: Glance) -> bool:
    named = _names(seen.columns)
    return not seen.folder and seen.shape in ("csv", "jsonl") and all(name in named for name in NEEDED)


def read(source: Source) -> OutcomeTable:
    """Read a long file.

    Raises:
        MixmergeError: a column is missing, a value is no number, a query is empty or its id another's, an expert
            has two different outcomes on one query.
    """
    builder = Builder(source.path, MEASURES)
    for at, row in _rows(source.path, builder):
        name = row.get("id")
        query = builder.query(
            at,
            row["query"],
            name=None if name is None or name == "" else str(name),
            metadata={k: v for k, v in row.items() if k not in (*NEEDED, *MEASURES, "id")},
            again=True,
        )
        if query is not None:
            builder.cell(at, query, row["expert"], row)
    return builder.table()


def _rows(path: Path, builder: Builder) -> Iterator[tuple[Place, dict[str, object]]]:
    if glance(path).shape == "csv":
        columns, rows = table_of(path)
        at = {ours: columns.index(theirs) for ours, theirs in _complete(columns, str(Place(path, 1))).items()}
        for line, cells in rows:
            yield Place(path, line), {name: cells[column] for name, column in at.items()}
        return
    for line, row in objects(path, builder.faults):
        place, names = Place(path, line), _names(row)
        missing = [name for name in NEEDED if name not in names]
        if missing:
            builder.faults.add(place, f"lacks {', '.join(missing)}", f"Needed: {', '.join(NEEDED)}")
        else:
            yield place, {ours: row[theirs] for ours, theirs in names.items()}


def _complete(columns: Iterable[str], where: str) -> Mapping[str, str]:
    names = _names(columns)
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise MixmergeError(
            Fault(
                where,
                f"lacks the column {', '.join(missing)}",
                f"Needed: {', '.join(NEEDED)}; there: {_list(columns)}",
            )
        )
    return names


def _names(columns: Iterable[str]) -> dict[str, str]:
    """Our name of each column -> the file's."""
    there = list(columns)
    renamed = {
        theirs: ours
        for ours, others in ALIASES.items()
        if ours not in there
        for theirs in [next((other for other in others if other in there), None)]
        if theirs is not None
    }
    return {renamed.get(name, name): name for name in there}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
