"""LLMRouter's and RouterDC's JSON: a list of ``{question, scores: {expert: score}}``, joined with JSONL on the queries.

The query files, where given, have ``query``, ``task_name``, ``metric`` and ``ground_truth``; they are joined on the
text and become ``task``, ``metric`` and ``gold``. Some of their texts are in two tasks: the first that comes counts.
``cluster_id``, which comes from somebody's clustering and not from outcomes, is passed over.
Source: ulab-uiuc/LLMRouter, data; shuhao02/RouterDC, datasets.
"""

from __future__ import annotations

from pathlib import Path

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.building import Builder
from mixmerge.outcomes.files import Faults, Place, document, objects
from mixmerge.outcomes.glance import Glance, Source, data_files
from mixmerge.outcomes.table import OutcomeTable

_FORM = '{"question": "...", "scores": {"expert": 1.0}}'
COLUMNS = {"task": "task_name", "metric": "metric", "gold": "ground_truth"}


def sniff(seen: Glance) -> bool:
    return not seen.folder and seen.shape == "json" and {"question", "scores"} <= set(seen.columns)


def read(source: Source) -> OutcomeTable:
    """Read scores, and what ``source.queries`` (a JSONL file, or a folder of them) says of their queries.

    Raises:
        MixmergeError: it is no list of such objects, a score is no number, none of the queries is in the other file.
    """
    builder = Builder(source.path)
    given = document(source.path)
    if not isinstance(given, list):
        raise MixmergeError(Fault(str(source.path), "is no list", f"A list of {_FORM}"))
    known = {} if source.queries is None else _known(source.queries, builder.faults)
    matched = 0
    for row, entry in enumerate(given, start=1):
        at = Place(source.path, row, "entry")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("scores"), dict)
            or "question" not in entry
        ):
            builder.faults.add(at, "is no outcome", _FORM)
            continue
        text = entry["question"]
        found = known.get(text) if isinstance(text, str) else None
        matched += found is not None
        query = builder.query(at, text, metadata=found)
        if query is None:
            continue
        for expert, score in entry["scores"].items():
            builder.cell(at, query, expert, {"score": score})
    table = builder.table()
    if source.queries is not None and not matched:
        raise MixmergeError(
            Fault(
                str(source.queries),
                f"has none of the queries of {source.path}",
                "Texts are the same to the letter",
            )
        )
    return table


def _known(path: Path, faults: Faults) -> dict[str, dict[str, object]]:
    """Metadata by text."""
    known: dict[str, dict[str, object]] = {}
    for file in data_files(path, (".jsonl",)) if path.is_dir() else [path]:
        for line, row in objects(file, faults):
            if not isinstance(row.get("query"), str):
                faults.add(Place(file, line), "lacks query", f"query, {', '.join(COLUMNS.values())}")
                continue
            known.setdefault(row["query"], {ours: row.get(theirs) for ours, theirs in COLUMNS.items()})
    faults.check()
    return known
