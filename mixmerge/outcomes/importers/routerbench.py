"""RouterBench's wide tables as CSV or Parquet, one row for each query.

``sample_id``, ``prompt``, ``eval_name`` (which becomes ``task``); for each expert a column of its name with the score,
and ``<expert>|total_cost`` in dollars; ``<expert>|model_response`` is passed over. Other columns are metadata, but for
``oracle_model_to_route_to``, which follows from the scores. The published tables are pickles, which are not read:
reading one runs the code in it.
A prompt that is written as a list of texts, ``['...']``, is these texts with an empty line between.
Source: RouterBench (Hu et al., 2024, arXiv 2403.12031); withmartian/routerbench.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.building import Builder
from mixmerge.outcomes.files import Place, parquet_of, parquet_schema, table_of
from mixmerge.outcomes.glance import Glance, Source, glance
from mixmerge.outcomes.table import OutcomeTable

ID, PROMPT, TASK, ORACLE = "sample_id", "prompt", "eval_name", "oracle_model_to_route_to"
COST, ANSWER = "|total_cost", "|model_response"
_BLOCK = 4096  # rows of Parquet that become Python objects at a time


def sniff(seen: Glance) -> bool:
    named = {ID, PROMPT, TASK} <= set(seen.columns)
    return not seen.folder and seen.shape in ("csv", "parquet") and named and bool(_experts(seen.columns))


def read(source: Source) -> OutcomeTable:
    """Read a table.

    Raises:
        MixmergeError: a column is missing, a score or cost is no number, a sample_id is there twice.
    """
    path, csv = source.path, glance(source.path).shape == "csv"
    columns = table_of(path)[0] if csv else list(parquet_schema(path).names)
    experts = _experts(columns)
    missing = [name for name in (ID, PROMPT, TASK) if name not in columns]
    if missing or not experts:
        raise MixmergeError(
            Fault(
                str(path),
                f"lacks the column {', '.join(missing) or 'of an expert'}",
                f"{ID}, {PROMPT}, {TASK}, <expert>, <expert>{COST}",
            )
        )
    builder = Builder(path, ("score", "cost"))
    used = [name for name in columns if name != ORACLE and not name.endswith(ANSWER)]
    own = {ID, PROMPT, *experts, *(f"{name}{COST}" for name in experts)}
    for at, row in _csv(path, used) if csv else _parquet(path, used):
        labels = {"task" if name == TASK else name: value for name, value in row.items() if name not in own}
        query = builder.query(at, _prompt(row[PROMPT]), name=str(row[ID]), metadata=labels)
        if query is None:
            continue
        for name in experts:
            builder.cell(at, query, name, {"score": row[name], "cost": row.get(f"{name}{COST}")})
    return builder.table()


def _experts(columns: Sequence[str]) -> list[str]:
    """Columns that have a cost or answers beside them; if none has, all that are nothing else."""
    plain = [name for name in columns if name not in (ID, PROMPT, TASK, ORACLE) and "|" not in name]
    paired = [name for name in plain if f"{name}{COST}" in columns or f"{name}{ANSWER}" in columns]
    return paired or plain


def _csv(path: Path, used: Sequence[str]) -> Iterator[tuple[Place, dict[str, object]]]:
    columns, rows = table_of(path)
    at = {name: columns.index(name) for name in used}
    for line, cells in rows:
        yield Place(path, line), {name: cells[column] for name, column in at.items()}


def _parquet(path: Path, used: Sequence[str]) -> Iterator[tuple[Place, dict[str, object]]]:
    row = 0
    for batch in parquet_of(path, used).to_batches(max_chunksize=_BLOCK):
        for values in batch.to_pylist():
            row += 1
            yield Place(path, row, "row"), values


def _prompt(given: object) -> object:
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        return "\n\n".join(given)
    if not isinstance(given, str) or not (given.startswith("[") and given.endswith("]")):
        return given
    try:
        parts = ast.literal_eval(given)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return given
    texts = isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts)
    return "\n\n".join(parts) if texts else given
