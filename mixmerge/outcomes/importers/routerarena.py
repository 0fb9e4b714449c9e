"""RouterArena's JSONL, one file for each expert, joined on ``global_index``.

Of each line ``llm_selected`` is the expert, ``evaluation_result.score`` and ``.inference_cost`` (dollars) the outcome,
missing where it was not evaluated, ``token_usage`` the tokens. ``task`` is the index without its number:
``AIME_112`` is of ``AIME``.
Source: RouteWorks/RouterArena, cached_results.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.outcomes.building import Builder
from mixmerge.outcomes.files import Place, objects
from mixmerge.outcomes.glance import Glance, Source, data_files
from mixmerge.outcomes.table import OutcomeTable

_KEYS = ("global_index", "question", "llm_selected")


def sniff(seen: Glance) -> bool:
    return seen.shape == "jsonl" and all(key in seen.columns for key in _KEYS)


def read(source: Source) -> OutcomeTable:
    """Read a file, or every JSONL file of a folder.

    Raises:
        MixmergeError: a line lacks a key or holds no numbers, one index has two questions, an expert has two
            different outcomes on one.
    """
    builder = Builder(source.path, ("score", "cost", "tokens_in", "tokens_out"))
    for path in data_files(source.path, (".jsonl",)) if source.path.is_dir() else [source.path]:
        _read(path, builder)
    return builder.table()


def _read(path: Path, builder: Builder) -> None:
    for line, row in objects(path, builder.faults):
        at = Place(path, line)
        missing = [key for key in _KEYS if key not in row]
        if missing:
            builder.faults.add(at, f"lacks {', '.join(missing)}", f"Needed: {', '.join(_KEYS)}")
            continue
        result, usage = _part(row, "evaluation_result"), _part(row, "token_usage")
        index = str(row["global_index"])
        labels = {"task": _task(index), "metric": result.get("metric"), "gold": result.get("ground_truth")}
        query = builder.query(at, row["question"], name=index, metadata=labels, again=True)
        if query is None:
            continue
        values = {
            "score": result.get("score"),
            "cost": result.get("inference_cost"),
            "tokens_in": usage.get("input_tokens"),
            "tokens_out": usage.get("output_tokens"),
        }
        builder.cell(at, query, row["llm_selected"], values)


def _part(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = row.get(key)
    return part if isinstance(part, dict) else {}


def _task(index: str) -> str:
    name, _, digits = index.rpartition("_")
    return name if name and digits.isdigit() else index
