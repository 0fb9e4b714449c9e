"""Routers that look at the most similar queries. Q queries, N stored ones, E experts, D dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.shrinkage import moments, shrink


class NearestOptions(Options):
    """``k`` neighbours; ``worth``: how many observations an expert's mean counts for beside theirs."""

    k: int = Field(40, ge=1)
    worth: float = Field(10.0, ge=0)


class NearestRouter(Router):
    """Mean score of the ``k`` nearest queries by cosine, shrunk to the expert's mean."""

    kind = "knn"
    options_type = NearestOptions
    independent = True
    per_expert = ("score", "mean", "variance")
    options: NearestOptions

    def learn(self, data: Training) -> State:
        mean, variance, _ = moments(data.score)
        return State(
            {"embedding": data.inputs.embedded(), "score": data.score, "mean": mean, "variance": variance},
            {"texts": list(data.inputs.texts)},
        )

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        score = state.arrays["score"][self._nearest(state, inputs)]  # (Q, k, E)
        known = ~np.isnan(score)
        total, count = np.where(known, score, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64)
        worth = np.full(score.shape[-1], max(self.options.worth, 1e-9))
        return Prediction(*shrink(total, count, state.arrays["mean"], worth, state.arrays["variance"]))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        nearest = self._nearest(state, inputs)[:, :top]
        return [{"neighbours": [{"query": state.values["texts"][i]} for i in row]} for row in nearest]

    def _nearest(self, state: State, inputs: Inputs) -> NDArray[np.int64]:
        similar = inputs.embedded() @ state.arrays["embedding"].T  # (Q, N)
        k = min(self.options.k, similar.shape[1])
        return np.argsort(-similar, axis=1, kind="stable")[:, :k]
