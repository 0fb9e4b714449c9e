"""Rows that a merge has used are not scored: what its manifest says, against a task's rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.used_rows import manifest_of, read_used
from mixmerge.data.rows import Row
from mixmerge.engine.finish import MANIFEST
from mixmerge.errors import Fault
from mixmerge.evaluate.task_file import EvalTask


@dataclass(frozen=True)
class Made:
    """What the manifest of a merged folder says; of another folder, nothing.

    Args:
        method: of the merge; None for a model that mixmerge did not make.
        seed: of the recipe.
        recipe: in its canonical form.
        rows: digests of the rows that it was calibrated on, or that its recipe was chosen by.
        transductive: the recipe says that it uses rows it is evaluated on.
        task: of a merge that is for one expert's task alone (``task: N``), that expert.
    """

    method: str | None = None
    seed: int | None = None
    recipe: Mapping[str, Any] | None = None
    rows: frozenset[str] = frozenset()
    transductive: bool = False
    task: str | None = None


def read_made(folder: Path) -> Made:
    """What a folder's ``mixmerge_manifest.json`` says; a damaged or foreign one says nothing."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Made()
    if not isinstance(found, dict):
        return Made()
    rows, meant = read_used(found)
    recipe = found.get("recipe")
    if isinstance(recipe, dict):
        given = recipe.get("calibration")
        meant = meant or (isinstance(given, dict) and given.get("transductive") is True)
    seed, method = found.get("seed"), found.get("method")
    return Made(
        method if isinstance(method, str) else None,
        seed if isinstance(seed, int) else None,
        recipe if isinstance(recipe, dict) else None,
        rows,
        meant,
        _task(recipe if isinstance(recipe, dict) else {}),
    )


def _task(recipe: Mapping[str, Any]) -> str | None:
    """The expert that a recipe's parameter ``task`` is the position of."""
    given, models = recipe.get("parameters"), recipe.get("models")
    number = given.get("task") if isinstance(given, dict) else None
    if isinstance(number, bool) or not isinstance(number, int | float) or not isinstance(models, list):
        return None
    names = [str(entry.get("model")) for entry in models if isinstance(entry, dict)]
    at = int(number)
    return names[at] if 0 <= at < len(names) else f"expert {at}"


def with_adapter(made: Made, adapter: Path) -> Made:
    """What is said of a base, with the rows that its adapter's manifest names."""
    rows, meant = read_used(manifest_of(adapter / MANIFEST))
    if not rows:
        return made
    return replace(made, rows=made.rows | rows, transductive=meant and (made.transductive or not made.rows))


def used_rows(made: Made, tasks: Sequence[EvalTask]) -> dict[str, int]:
    """Task -> how many of its rows the merge has used; tasks without one are left out."""
    counts = {task.name: sum(_is_used(row, made) for row in task.rows) for task in tasks}
    return {name: count for name, count in counts.items() if count}


def _is_used(row: Row, made: Made) -> bool:
    """Whether a merge has seen a row, with its choices, with others or without any."""
    return not made.rows.isdisjoint(row.known_by)


def leak_faults(model: str, used: Mapping[str, int], tasks: Sequence[EvalTask]) -> list[Fault]:
    """One for each task whose rows the merge has used."""
    sizes = {task.name: len(task.rows) for task in tasks}
    run = "Score other rows, or say --transductive: the report then says so"
    return [
        Fault(model, f"was made with {count:,} of the {sizes[name]:,} rows of task {name}", run=run)
        for name, count in used.items()
    ]
