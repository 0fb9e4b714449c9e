"""Oracles: routers that look at the outcomes of the very queries they score. Q queries, N known texts, E experts.

They say how far routing could get, and are for evaluation only: fit them on the rows they are evaluated on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Inputs, Prediction, Router, State, Training
from mixmerge.routers.constants import TaskMeanOptions, TaskMeanRouter
from mixmerge.routers.shrinkage import group_sums, moments
from mixmerge.routers.trained import text_hashes


class OracleTaskOptions(TaskMeanOptions):
    """``label``: column of the queries' metadata; by default ``task``, or else ``category``."""

    worth: float | None = Field(0.0, ge=0)


class OracleTaskRouter(TaskMeanRouter):
    """Every expert's mean score on the task, not shrunk: a reference, to be fitted on the rows it is evaluated on.

    Its picks are the best that one expert for each task can do.
    """

    kind = "oracle_task"
    options_type = OracleTaskOptions

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        said = super().explain(state, inputs, top=top)
        return [{**one, "reference": "fitted on the outcomes it is evaluated on"} for one in said]


class OracleRouter(Router):
    """The score an expert has on this very query: a reference, to be fitted on the rows it is evaluated on.

    Queries are known by their text; the mean where a text is there more than once. A score that is missing counts
    as the lowest of its query, so that a known one is picked. Other queries get the experts' means.
    """

    kind = "oracle"
    embeds = False

    def learn(self, data: Training) -> State:
        texts, place = np.unique(text_hashes(data.inputs.texts), return_inverse=True)
        total, count = group_sums(data.score, place, len(texts))
        mean, variance, number = moments(data.score)
        known = np.where(count > 0, total / np.maximum(count, 1), np.inf)
        score = np.where(count > 0, known, known.min(axis=1, keepdims=True))
        return State({"texts": texts, "score": score, "mean": mean, "std": np.sqrt(variance / number)})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        seen, at = self._seen(state, inputs)
        mean = np.where(seen, state.arrays["score"][at], state.arrays["mean"])
        return Prediction(mean, np.where(seen, 0.0, state.arrays["std"]))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        seen, _ = self._seen(state, inputs)
        own = "the outcomes of this very query"
        return [
            {"reference": own if one else "the experts' means: this query is not known"} for one in seen[:, 0]
        ]

    def _seen(self, state: State, inputs: Inputs) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """``(Q, 1)`` whether the text is known, and ``(Q,)`` where."""
        texts, asked = state.arrays["texts"], text_hashes(inputs.texts)
        at = np.minimum(np.searchsorted(texts, asked), len(texts) - 1)
        return (texts[at] == asked)[:, None], at
