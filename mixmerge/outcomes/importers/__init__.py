"""Formats of outcomes, by name. A package of yours adds one by an entry point of the group ``mixmerge.outcomes``
that gives such a row.

``sniff`` gets a ``mixmerge.outcomes.glance.Glance`` and says whether the file is of its format; the first that says
so reads it, these before those of other packages. ``read`` gets a ``mixmerge.outcomes.glance.Source`` and gives an
``OutcomeTable``; ``mixmerge.outcomes.building.Builder`` does what importers have in common.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Importer:
    """One format.

    Args:
        sniff: ``module:function`` of a ``Glance``, to a bool.
        read: ``module:function`` of a ``Source``, to an ``OutcomeTable``.
        summary: what it looks like, in a line.
        folders: it reads a folder of files too.
        queries: it takes a second file that says more of the queries.
    """

    sniff: str
    read: str
    summary: str
    folders: bool = False
    queries: bool = False


def _row(module: str, summary: str, *, folders: bool = False, queries: bool = False) -> Importer:
    where = f"mixmerge.outcomes.importers.{module}"
    return Importer(f"{where}:sniff", f"{where}:read", summary, folders, queries)


IMPORTERS: dict[str, Importer] = {
    "mixmerge": _row("own", "Parquet or JSONL as OutcomeTable.write makes it"),
    "long": _row("long", "CSV or JSONL, one row for each query and expert: query, expert, score, ..."),
    "routerbench": _row(
        "routerbench", "CSV or Parquet: sample_id, prompt, eval_name, <expert>, <expert>|total_cost"
    ),
    "routellm": _row(
        "routellm", "CSV: prompt and one column for each expert; or a folder of them", folders=True
    ),
    "mtbench": _row("mtbench", "JSONL of MT-Bench judgements, with the questions beside it", queries=True),
    "llmrouter": _row("llmrouter", "JSON list of {question, scores: {expert: score}}", queries=True),
    "routerarena": _row("routerarena", "JSONL of one expert's answers; or a folder of them", folders=True),
}
