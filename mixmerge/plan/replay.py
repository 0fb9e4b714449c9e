"""Learned coefficients in a plan: read from a file, held against its tensors, and put in as weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mixmerge.errors import Fault, RecipeError
from mixmerge.methods import Method
from mixmerge.methods.coefficients import Coefficients, read_coefficients
from mixmerge.plan.agree import some
from mixmerge.plan.model import Task
from mixmerge.recipe import Recipe, inputs

# Methods that mix something else than the experts' deltas.
_OTHER_DELTAS = ("adamerging_plus",)


def replayed(
    recipe: Recipe, method: Method, tasks: list[Task], faults: list[Fault], warnings: list[str]
) -> list[Task]:
    """The tasks with the coefficients a recipe names; as they are, if it names none or they do not fit."""
    if recipe.coefficients is None:
        return tasks
    where = f"coefficients: {recipe.coefficients}"
    try:
        text = Path(recipe.coefficients).read_text(encoding="utf-8")
        learned = read_coefficients(text, where=where)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        faults.append(Fault(where, f"cannot be read: {reason}"))
        return tasks
    except RecipeError as error:
        faults.extend(error.faults)
        return tasks
    found = _faults(recipe, method, tasks, learned, where)
    if found:
        faults.extend(found)
        return tasks
    experts = tuple(str(entry.model) for entry in inputs(recipe, method))
    if experts != learned.experts:
        warnings.append(f"{where}: learned for {', '.join(learned.experts)}, used for {', '.join(experts)}")
    extra = learned.weights.keys() - {task.target.name for task in tasks}
    if extra:
        warnings.append(f"{where}: not in this merge, so unused: {some(sorted(extra))}")
    return weighted(tasks, learned, method)


def _faults(
    recipe: Recipe, method: Method, tasks: Sequence[Task], learned: Coefficients, where: str
) -> list[Fault]:
    count = len(inputs(recipe, method))
    faults = []
    other_deltas = {method.name, learned.method} & set(_OTHER_DELTAS)
    if other_deltas and method.name != learned.method:
        what = f"learned by {learned.method}, whose deltas are not those of {method.name}"
        faults.append(Fault(where, what, run=f"Set merge_method: {learned.method}"))
    if count != len(learned.experts):
        faults.append(Fault(where, f"has coefficients of {len(learned.experts)} experts, the recipe {count}"))
    lacking = [
        task.target.name for task in tasks if not task.copied and task.target.name not in learned.weights
    ]
    if lacking:
        faults.append(Fault(where, f"has no coefficients for {some(lacking)}"))
    return faults


def weighted(tasks: Sequence[Task], learned: Coefficients, method: Method) -> list[Task]:
    """The tasks with learned coefficients as their weights, and without the parameters that steer learning."""
    return [
        task if task.copied else _weighted(task, learned.weights[task.target.name], method) for task in tasks
    ]


def _weighted(task: Task, rows: tuple[tuple[float, ...], ...], method: Method) -> Task:
    steers = {parameter.name for parameter in method.parameters if parameter.learning}
    kept = {name: value for name, value in task.parameters.items() if name not in steers}
    kept = {"normalize": False, "lambda": 1.0, **kept, "weight": rows[0]}
    return dataclasses.replace(task, parameters=kept, chunks=rows if len(rows) > 1 else ())
