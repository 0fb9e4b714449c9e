"""RouteLLM's CSV files of GSM8K and MMLU: ``prompt``, and a column of True and False for each expert.

Columns ``<expert>_response`` are passed over: they hold texts, not tokens. ``task`` is the file's name without
``mmlu_`` and ``_responses``; of a folder of files, so each subject is a task.
Source: lm-sys/RouteLLM, routellm/evals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.building import Builder
from mixmerge.outcomes.files import Place, table_of
from mixmerge.outcomes.glance import Glance, Source, data_files
from mixmerge.outcomes.table import OutcomeTable

PROMPT, ANSWER = "prompt", "_response"


def sniff(seen: Glance) -> bool:
    return seen.shape == "csv" and seen.columns[:1] == (PROMPT,) and bool(_experts(seen.columns))


def read(source: Source) -> OutcomeTable:
    """Read a file, or every CSV file of a folder.

    Raises:
        MixmergeError: no prompts or no experts, a value is neither True, False nor a number, a prompt is empty.
    """
    builder = Builder(source.path)
    for path in data_files(source.path, (".csv",)) if source.path.is_dir() else [source.path]:
        _read(path, builder)
    return builder.table()


def _read(path: Path, builder: Builder) -> None:
    columns, rows = table_of(path)
    experts = _experts(columns)
    if PROMPT not in columns or not experts:
        raise MixmergeError(
            Fault(
                str(Place(path, 1)),
                f"has the columns {', '.join(columns)}",
                f"{PROMPT}, and one for each expert",
            )
        )
    task, prompt = path.stem.removeprefix("mmlu_").removesuffix("_responses"), columns.index(PROMPT)
    at_of = {name: columns.index(name) for name in experts}
    for line, cells in rows:
        at = Place(path, line)
        query = builder.query(at, cells[prompt], metadata={"task": task})
        if query is None:
            continue
        for name, column in at_of.items():
            builder.cell(at, query, name, {"score": cells[column]})


def _experts(columns: Sequence[str]) -> list[str]:
    answers = {f"{name}{ANSWER}" for name in columns}
    return [name for name in columns if name != PROMPT and name not in answers]
