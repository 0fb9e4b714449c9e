"""Routers that hardly look at a query: what every other one has to beat. Q queries, E experts.

None embeds. ``mixmerge.routers.references`` has those that look at what they are evaluated on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers.base import Floats, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.costs import mean_costs
from mixmerge.routers.draws import uniform
from mixmerge.routers.shrinkage import Line, grouped, moments, shrink
from mixmerge.routers.trained import text_hashes

LABELS = ("task", "category")  # columns that hold labels, if none is named


class _Constant(Router):
    """Adds an expert by putting its arrays behind those of the others."""

    embeds = False

    def extend(self, state: State, data: Training) -> State:
        more = self.learn(data)
        behind = {
            name: np.concatenate([state.arrays[name], more.arrays[name]], axis=-1) for name in self.per_expert
        }
        return replace(state, arrays={**state.arrays, **behind})


class RandomRouter(_Constant):
    """A draw from [0, 1) for each query and expert, keyed by the query's text, the expert's name and the seed.

    It is no expected score. The uncertainty is that of the draw.
    """

    kind = "random"
    per_expert = ("key",)

    def learn(self, data: Training) -> State:
        return State({"key": text_hashes(data.experts)})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        mean = uniform(text_hashes(inputs.texts), state.arrays["key"], seed=self.seed)
        return Prediction(mean, np.full(mean.shape, 12**-0.5))


class BestSingleRouter(_Constant):
    """The mean score of every expert, for every query."""

    kind = "best_single"
    independent = True
    per_expert = ("mean", "std")

    def learn(self, data: Training) -> State:
        mean, variance, count = moments(data.score)
        return State({"mean": mean, "std": np.sqrt(variance / count)})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        rows = (len(inputs), 1)
        return Prediction(np.tile(state.arrays["mean"], rows), np.tile(state.arrays["std"], rows))


class CheapestRouter(_Constant):
    """Minus the dollars that a query is expected to cost: the cheapest expert is the best.

    Its mean cost where the outcomes say it, else its price at their mean length. It is no expected score.

    Raises:
        MixmergeError: experts of which neither cost nor price is known.
    """

    kind = "cheapest"
    independent = True
    per_expert = ("dollars",)

    def learn(self, data: Training) -> State:
        dollars = mean_costs(data.costs, data.experts, data.prices, data.inputs.texts)
        unknown = [name for name, known in zip(data.experts, ~np.isnan(dollars), strict=True) if not known]
        if unknown:
            raise MixmergeError(
                Fault(
                    "router cheapest",
                    f"nothing is known of what {', '.join(unknown)} cost",
                    run="Give costs or prices with the outcomes",
                )
            )
        return State({"dollars": dollars})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        mean = np.tile(-state.arrays["dollars"], (len(inputs), 1))
        return Prediction(mean, np.zeros_like(mean))


class LengthOptions(Options):
    """``learned``: whether the outcomes say how score depends on length, or the longer is for the strongest expert."""

    learned: bool = True


class LengthRouter(_Constant):
    """Every expert's score as a line of the logarithm of the query's length in characters, its slope shrunk.

    Lengths beyond those an expert was fitted on count as the nearest of them. For two experts the difference of the
    scores rises or falls with the length, so a threshold on it is one on the length.

    With ``learned=False`` no slope is fitted: the longer the query, the further is the expert of the best mean ahead
    of the others, which stay at theirs. Only the order of the queries by that means anything.
    """

    kind = "length"
    options_type = LengthOptions
    per_expert = (*Line.names, "low", "high")
    options: LengthOptions

    @property
    def independent(self) -> bool:
        return self.options.learned

    def learn(self, data: Training) -> State:
        length = _length(data.inputs.texts)
        line = Line.fit(length, data.score)
        if not self.options.learned:
            best = max(range(len(data.experts)), key=lambda e: (line.mean[e], data.experts[e]))
            line = replace(line, slope=np.where(np.arange(len(data.experts)) == best, 1.0, 0.0))
        known = ~np.isnan(data.score)
        low, high = np.where(known, length, np.inf).min(axis=0), np.where(known, length, -np.inf).max(axis=0)
        return State({**line.arrays(), "low": low, "high": high})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        length = np.clip(_length(inputs.texts), state.arrays["low"], state.arrays["high"])
        return Prediction(*Line.of(state.arrays).at(length))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        slopes = dict(zip(self.experts, state.arrays["slope"].tolist(), strict=True))
        return [{"characters": len(text), "slopes": slopes} for text in inputs.texts]


def _length(texts: Sequence[str]) -> Floats:
    """``(Q, 1)``."""
    return np.log1p(np.array([len(text) for text in texts], np.float64).reshape(-1, 1))


class TaskMeanOptions(Options):
    """``label``: column of the queries' metadata; ``worth``: observations an expert's mean counts for.

    By default the column is ``task``, or else ``category``, and the worth is estimated from how far the tasks'
    means lie apart.
    """

    label: str | None = None
    worth: float | None = Field(None, ge=0)


class TaskMeanRouter(_Constant):
    """Every expert's mean score on queries of the same task, shrunk to its mean; that mean where there is no label.

    Raises:
        MixmergeError: the outcomes have no such column, or no label in it.
    """

    kind = "task_mean"
    options_type = TaskMeanOptions
    independent = True
    per_expert = ("total", "count", "mean", "variance", "seen", "worth")
    options: TaskMeanOptions

    def learn(self, data: Training) -> State:
        label, column = labels_of(data.inputs.metadata, self.options.label, needed_by=f"router {self.kind}")
        tasks = sorted(set(column) - {""})
        return State(self._arrays(data, column, tasks), {"label": label, "tasks": tasks})

    def _arrays(self, data: Training, column: Sequence[str], tasks: Sequence[str]) -> dict[str, Floats]:
        at = {task: place for place, task in enumerate(tasks)}
        labelled = np.array([task in at for task in column], np.bool_)
        group = np.array([at[task] for task in column if task in at], np.int64)
        return grouped(data.score[labelled], group, len(tasks), of=data.score, worth=self.options.worth)

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        known = state.arrays
        none = np.zeros((1, len(known["mean"])))  # of a task that was not seen
        total, count = (np.concatenate([known[name], none]) for name in ("total", "count"))
        prior, worth, variance = (known[name] for name in ("mean", "worth", "variance"))
        mean, std = shrink(total, count, prior, worth, variance, seen=known["seen"])
        at = {task: place for place, task in enumerate(state.values["tasks"])}
        rows = np.array([at.get(task, -1) for task in self._column(state, inputs)], np.int64)
        return Prediction(mean[rows], std[rows])

    def extend(self, state: State, data: Training) -> State:
        """Its tasks may be new: the others' experts have no score there, so their means stand."""
        label, tasks = state.values["label"], state.values["tasks"]
        column = data.inputs.metadata.get(label, ("",) * len(data.inputs))
        more = [*tasks, *sorted(set(column) - {"", *tasks})]
        new = self._arrays(data, column, more)
        pad = ((0, len(more) - len(tasks)), (0, 0))
        old = {
            name: np.pad(array, pad) if name in ("total", "count") else array
            for name, array in state.arrays.items()
        }
        arrays = {name: np.concatenate([old[name], new[name]], axis=-1) for name in self.per_expert}
        return State(arrays, {"label": label, "tasks": more})

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        at = {task: place for place, task in enumerate(state.values["tasks"])}
        return [
            {
                "task": task,
                "counts": dict(zip(self.experts, state.arrays["count"][at[task]].tolist(), strict=True))
                if task in at
                else {},
            }
            for task in self._column(state, inputs)
        ]

    def _column(self, state: State, inputs: Inputs) -> Sequence[str]:
        column = inputs.metadata.get(state.values["label"])
        return ("",) * len(inputs) if column is None else column


def labels_of(
    metadata: Mapping[str, Sequence[str]], label: str | None, *, needed_by: str
) -> tuple[str, Sequence[str]]:
    """Name and values of the column of labels: ``label``, or by default ``task`` or else ``category``.

    Raises:
        MixmergeError: there is none, or it is empty.
    """
    for name in LABELS if label is None else (label,):
        if any(metadata.get(name, ())):
            return name, metadata[name]
    wanted = " or ".join(LABELS) if label is None else label
    filled = ", ".join(sorted(name for name in metadata if any(metadata[name]))) or "none"
    raise MixmergeError(
        Fault(
            f"{needed_by}: label", f"the outcomes have no labels in a column {wanted}", f"Columns: {filled}"
        )
    )
