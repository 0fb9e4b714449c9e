"""From scores row by row to a report: every figure of every model on the same resampled rows.

M models, T tasks, Q rows of a task, B resamples.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.evaluate.intervals import Comparison, Estimate, bootstrap_means, compare, estimate, groups_of
from mixmerge.evaluate.leaks import Made
from mixmerge.evaluate.model_records import ModelRow, Role, Seeds, TaskInfo
from mixmerge.evaluate.scoring_tasks import TaskScores
from mixmerge.evaluate.task_file import EvalTask

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """A model that was asked everything.

    Args:
        name, role, storage, flops: as in ``ModelRow``.
        answers: task -> its scores.
        made: what its manifest says.
        transductive: tasks with rows that its merge has used.
    """

    name: str
    role: Role
    answers: Mapping[str, TaskScores]
    made: Made
    storage: int
    transductive: tuple[str, ...] = ()
    flops: float = math.nan


@dataclass(frozen=True, eq=False)
class Means:
    """Mean scores and their resamples: ``(T, M)`` and ``(B, T, M)``."""

    value: Floats
    drawn: Floats

    def over(self, tasks: Sequence[int]) -> tuple[Floats, Floats]:
        """Means over some of the tasks: ``(M,)`` and ``(B, M)``."""
        chosen = list(tasks)
        return self.value[chosen].mean(axis=0), self.drawn[:, chosen].mean(axis=1)


def info(task: EvalTask) -> TaskInfo:
    """What the report says of a task."""
    return TaskInfo(task.name, task.spec.metric, len(task.rows), task.spec.expert, task.spec.held_out)


def means_of(tasks: Sequence[EvalTask], models: Sequence[Judged], *, resamples: int, seed: int) -> Means:
    """Means of all models on all tasks. The rows of a task are drawn together for all models, those of different
    tasks apart; what is drawn depends on the seed, the task's name and its rows alone.
    """
    value, drawn = [], []
    for task in tasks:
        scores = np.stack([model.answers[task.name].scores for model in models], axis=1)  # (Q, M)
        groups = groups_of([row.digest for row in task.rows])
        own_seed = (seed + zlib.crc32(task.name.encode())) % 2**32
        value.append(scores.mean(axis=0))
        drawn.append(bootstrap_means(scores, groups, resamples=resamples, seed=own_seed))
    return Means(np.stack(value), np.stack(drawn, axis=1))


def measure(
    tasks: Sequence[EvalTask], models: Sequence[Judged], means: Means, *, level: float
) -> tuple[tuple[ModelRow, ...], str | None]:
    """The rows of a report, in the order of the models, and the name of the best single expert."""
    held_in = [at for at, task in enumerate(tasks) if not task.spec.held_out] or list(range(len(tasks)))
    held_out = [at for at, task in enumerate(tasks) if task.spec.held_out]
    value, drawn = means.over(held_in)
    experts = [at for at, model in enumerate(models) if model.role == "expert"]
    best = max(experts, key=lambda at: value[at], default=None)
    own = _own(tasks, models)
    rows = []
    for at, model in enumerate(models):
        retained, shares = _retained(tasks, means, at, own, level)
        rows.append(
            ModelRow(
                name=model.name,
                role=model.role,
                scores={
                    task.name: estimate(float(means.value[t, at]), means.drawn[:, t, at], level=level)
                    for t, task in enumerate(tasks)
                },
                retained=retained,
                average=estimate(float(value[at]), drawn[:, at], level=level),
                retained_average=_lowest_or_mean(retained, shares, level, lowest=False),
                worst=_worst(retained, shares, level),
                held_out=_held_out(means, held_out, at, level),
                over_best=_over(value, drawn, at, best, level),
                storage=model.storage,
                speed=_speed(model),
                flops=model.flops,
                method=model.made.method,
                seed=model.made.seed if model.made.method is not None else None,
                transductive=model.transductive,
                answers=model.answers,
            )
        )
    return tuple(rows), None if best is None else models[best].name


def _own(tasks: Sequence[EvalTask], models: Sequence[Judged]) -> dict[str, int]:
    """Task -> place of its own expert."""
    places = {model.name: at for at, model in enumerate(models) if model.role == "expert"}
    return {
        task.name: places[task.spec.expert]
        for task in tasks
        if task.spec.expert is not None and task.spec.expert in places
    }


def _retained(
    tasks: Sequence[EvalTask], means: Means, at: int, own: Mapping[str, int], level: float
) -> tuple[dict[str, Estimate], Floats]:
    """Task -> share of its own expert's score, and ``(B, tasks)`` of their resamples."""
    retained, columns = {}, []
    for t, task in enumerate(tasks):
        expert = own.get(task.name)
        if expert is None or means.value[t, expert] <= 0:
            continue
        below = means.drawn[:, t, expert]
        share = np.where(below > 0, means.drawn[:, t, at] / np.where(below > 0, below, 1.0), np.nan)
        value = float(means.value[t, at] / means.value[t, expert])
        retained[task.name] = estimate(value, share, level=level)
        columns.append(share)
    return retained, np.stack(columns, axis=1) if columns else np.zeros((0, 0))


def _lowest_or_mean(
    retained: Mapping[str, Estimate], shares: Floats, level: float, *, lowest: bool
) -> Estimate | None:
    if not retained:
        return None
    values = [one.value for one in retained.values()]
    if lowest:
        return estimate(min(values), shares.min(axis=1), level=level)
    return estimate(float(np.mean(values)), shares.mean(axis=1), level=level)


def _worst(retained: Mapping[str, Estimate], shares: Floats, level: float) -> tuple[str, Estimate] | None:
    lowest = _lowest_or_mean(retained, shares, level, lowest=True)
    if lowest is None:
        return None
    return min(retained, key=lambda name: retained[name].value), lowest


def _held_out(means: Means, held_out: Sequence[int], at: int, level: float) -> Estimate | None:
    if not held_out:
        return None
    value, drawn = means.over(held_out)
    return estimate(float(value[at]), drawn[:, at], level=level)


def _over(value: Floats, drawn: Floats, at: int, best: int | None, level: float) -> Comparison | None:
    if best is None or best == at:
        return None
    return compare(float(value[at] - value[best]), drawn[:, at] - drawn[:, best], level=level)


def _speed(model: Judged) -> float:
    seconds = sum(one.seconds for one in model.answers.values())
    return sum(one.tokens for one in model.answers.values()) / seconds if seconds > 0 else float("nan")


def spreads_of(rows: Sequence[ModelRow], made: Mapping[str, Made]) -> tuple[Seeds, ...]:
    """Merges whose recipes differ in the seed alone, two or more each.

    Args:
        rows: of the report.
        made: name -> what its manifest says.
    """
    same: dict[str, list[ModelRow]] = {}
    for row in rows:
        recipe = made[row.name].recipe
        if row.role == "merge" and recipe is not None and row.seed is not None:
            rest = {key: value for key, value in recipe.items() if key != "seed"}
            same.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    found = []
    for group in same.values():
        if len({row.seed for row in group}) < 2:
            continue
        values = np.array([row.average.value for row in group])
        found.append(
            Seeds(
                tuple(row.name for row in group),
                tuple(row.seed or 0 for row in group),
                float(values.mean()),
                float(values.std(ddof=1)),
                float(values.min()),
                float(values.max()),
            )
        )
    return tuple(found)
