"""Learned coefficients in a plan: read from a file, held against its tensors, and put in as weights or factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mixmerge.errors import Fault, RecipeError
from mixmerge.methods import Method
from mixmerge.methods.coefficients import Coefficients, read_coefficients
from mixmerge.methods.footprint import Sizes, most_directions
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
    if learned.shared != method.learns_directions:
        kind = "factors of the directions of a sum" if learned.shared else "weights of experts"
        what = f"has {kind}, learned by {learned.method}, which {method.name} does not take"
        return [Fault(where, what, run=f"Set merge_method: {learned.method}")]
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
    if learned.shared:
        faults.extend(_too_many(tasks, learned, where))
    return faults


def _too_many(tasks: Sequence[Task], learned: Coefficients, where: str) -> list[Fault]:
    """Factors of more directions than tensors can have; fewer, as of a sum of low rank, are held against the sum."""
    faults = []
    for task in tasks:
        count = len(learned.weights.get(task.target.name, ()))
        sizes = Sizes(task.target.shape, task.role, len(task.sources), task.parameters)
        most = max(1, most_directions(sizes))
        if not task.copied and count > most:
            what = f"has factors of {count} directions, and the tensor has at most {most}"
            faults.append(Fault(f"{where}: weights.{task.target.name}", what))
    return faults[:20]


def weighted(tasks: Sequence[Task], learned: Coefficients, method: Method) -> list[Task]:
    """The tasks with learned coefficients as weights or factors, and without the parameters that steer learning."""
    return [task if task.copied else _weighted(task, learned, method) for task in tasks]


def _weighted(task: Task, learned: Coefficients, method: Method) -> Task:
    name = task.target.name
    rows = learned.weights[name]
    steers = {parameter.name for parameter in method.parameters if parameter.learning}
    kept = {name: value for name, value in task.parameters.items() if name not in steers}
    if learned.shared:
        factors = tuple(row[0] for row in rows)
        norm = learned.nuclear.get(name, 0.0)
        return dataclasses.replace(task, parameters=kept, factors=factors, nuclear=norm)
    kept = {"normalize": False, "lambda": 1.0, **kept, "weight": rows[0]}
    return dataclasses.replace(task, parameters=kept, chunks=rows if len(rows) > 1 else ())
