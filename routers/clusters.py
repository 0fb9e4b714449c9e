"""Scores by clusters of queries. Q queries, C clusters, E experts, D dimensions, k clusters of a query."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.routers.base import Embedding, Floats, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.features import unit
from mixmerge.routers.grid import on_grid
from mixmerge.routers.shrinkage import grouped, shrink

RANK_OFFSET = 0.1  # an expert that r others beat in a cluster gets 1 / (r + RANK_OFFSET)
_ROWS = 10  # queries a cluster has on average, at least
_SMALL = 100  # characters of the query that stands for a cluster
Indices = NDArray[np.int64]


class ClusterOptions(Options):
    """How clusters are made and read.

    Args:
        clusters: at most; fewer where there are not ten queries for each.
        top_k: nearest clusters that count for a query.
        beta: how much more the nearer ones do: in proportion to exp(-beta * cosine distance).
        worth: queries that an expert's mean counts for in a cluster, 0 or more; by default estimated from how far
            the clusters' means lie apart.
        fuse: ``mean``: expected scores; ``rank``: an expert counts for 1 / (r + 0.1), where r others beat it in the
            cluster: 10 for the best, 0.91 for the next. A sum of those is no expected score: it is for choosing the
            best, or the best few.
        alpha: share of the score, against cheapness, both scaled to [0, 1] over the experts of a cluster; scores
            alone and as they are if not given. The sum is no expected score either.
    """

    clusters: int = Field(64, ge=1)
    top_k: int = Field(3, ge=1)
    beta: float = Field(6.0, ge=0)
    worth: float | None = Field(None, ge=0)
    fuse: Literal["mean", "rank"] = "mean"
    alpha: float | None = Field(None, ge=0, le=1)


class ClusterRouter(Router):
    """Mean score in the clusters nearest to a query, each shrunk to the expert's mean.

    Source: Zhang et al. (2025), The Avengers, arXiv 2505.19797, and its released code; for ``alpha`` its sequel
    Avengers-Pro, Beyond GPT-5, arXiv 2508.12631. Defaults are those of its configurations but for ``fuse``: there ranks
    are fused, which scores no better and says less. Deviations: means are shrunk, as a cluster may hold a few queries;
    equal means share a rank; training queries count for the nearest centre by cosine, as queries do later; an expert's
    cost is its mean cost, not that of the cluster; none is dropped from the pool.
    """

    kind = "avengers"
    options_type = ClusterOptions
    per_expert = ("total", "count", "mean", "variance", "seen", "worth", "cost")
    options: ClusterOptions

    @property
    def independent(self) -> bool:
        return self.options.fuse == "mean" and self.options.alpha is None

    def learn(self, data: Training) -> State:
        embedding = on_grid(data.inputs.embedded())
        wanted = min(self.options.clusters, max(1, len(embedding) // _ROWS))
        centres = _centres(embedding, wanted, seed=self.seed)
        similar = embedding @ centres.T  # (Q, C)
        nearest = similar.argmax(axis=1)
        typical = [data.inputs.texts[row][:_SMALL] for row in similar.argmax(axis=0)]
        sizes = np.bincount(nearest, minlength=len(centres)).astype(np.int64)
        arrays: dict[str, NDArray[Any]] = {
            "centres": centres.astype(np.float16),
            "sizes": sizes,
            **self._experts(data, nearest, len(centres)),
        }
        return State(arrays, {"typical": typical})

    def _experts(self, data: Training, nearest: Indices, clusters: int) -> dict[str, Floats]:
        """What is known of experts, from queries of which the nearest cluster is known."""
        unknown = [name for name, cost in zip(data.experts, data.costs, strict=True) if np.isnan(cost)]
        if self.options.alpha is not None and unknown:
            raise MixmergeError(
                Fault(
                    "router avengers: alpha",
                    f"nothing is known of what {', '.join(unknown)} cost",
                    run="Give costs, or prices and tokens, with the outcomes, or leave alpha out",
                )
            )
        known = grouped(data.score, nearest, clusters, of=data.score, worth=self.options.worth)
        return {**known, "cost": data.costs}

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        chosen, weight, _ = self._nearest(state, inputs.embedded())
        mean, std = self._table(state)
        spread = np.zeros((len(inputs), len(mean)))  # (Q, C)
        np.put_along_axis(spread, chosen, weight, axis=1)
        return Prediction(spread @ mean, np.sqrt(spread**2 @ std**2))

    def extend(self, state: State, data: Training) -> State:
        """The clusters stay as they are."""
        similar = on_grid(data.inputs.embedded()) @ state.arrays["centres"].astype(np.float32).T
        more = self._experts(data, similar.argmax(axis=1), len(state.arrays["sizes"]))
        behind = {name: np.concatenate([state.arrays[name], more[name]], axis=-1) for name in self.per_expert}
        return replace(state, arrays={**state.arrays, **behind})

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        chosen, weight, similar = self._nearest(state, inputs.embedded())
        table, _ = self._table(state)
        order = np.argsort(-weight, axis=1, kind="stable")[:, :top]
        return [
            {
                "clusters": [
                    {
                        "cluster": int(chosen[q, at]),
                        "weight": float(weight[q, at]),
                        "similarity": float(similar[q, at]),
                        "queries": int(state.arrays["sizes"][chosen[q, at]]),
                        "typical": state.values["typical"][chosen[q, at]],
                        "scores": dict(zip(self.experts, table[chosen[q, at]].tolist(), strict=True)),
                        "counts": dict(
                            zip(self.experts, state.arrays["count"][chosen[q, at]].tolist(), strict=True)
                        ),
                    }
                    for at in order[q]
                ]
            }
            for q in range(len(inputs))
        ]

    def _nearest(self, state: State, embedding: Embedding) -> tuple[Indices, Floats, Embedding]:
        """Nearest clusters of every query, their weights and cosines: ``(Q, k)`` each."""
        similar = on_grid(embedding) @ state.arrays["centres"].astype(np.float32).T  # (Q, C)
        k = min(self.options.top_k, similar.shape[1])
        chosen = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similar, chosen, axis=1)
        weight = np.exp(self.options.beta * (near.astype(np.float64) - near.max(axis=1, keepdims=True)))
        return chosen, weight / weight.sum(axis=1, keepdims=True), near

    def _table(self, state: State) -> tuple[Floats, Floats]:
        """What every expert counts for in every cluster, and its standard deviation: ``(C, E)`` each."""
        known, alpha = state.arrays, self.options.alpha
        parts = (known[name] for name in ("total", "count", "mean", "worth", "variance"))
        mean, std = shrink(*parts, seen=known["seen"])
        if alpha is not None:
            scale = np.ptp(mean, axis=1, keepdims=True)
            mean = alpha * _scaled(mean) + (1 - alpha) * _scaled(-known["cost"][None, :])
            std = alpha * std / np.where(scale > 0, scale, 1.0)
        if self.options.fuse == "rank":
            better = (mean[:, None, :] > mean[:, :, None]).sum(axis=2)  # how many experts are
            mean = 1 / (better + RANK_OFFSET)
        return mean, std


def _scaled(values: Floats) -> Floats:
    """Rows scaled to [0, 1]; zeros where all are the same."""
    spread = np.ptp(values, axis=1, keepdims=True)
    scaled: Floats = (values - values.min(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return scaled


def _centres(embedding: Embedding, wanted: int, *, seed: int) -> Embedding:
    """``(C, D)`` of unit length, by k-means. On one thread: two add up in either order."""
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise DependencyError(
            Fault("router avengers", "needs scikit-learn", run="pip install 'mixmerge[route]'")
        ) from error
    wanted = min(wanted, len({row.tobytes() for row in embedding}))
    how = "elkan" if wanted > 1 else "lloyd"
    with threadpool_limits(limits=1):
        made = KMeans(
            wanted, init="k-means++", n_init=1, max_iter=1000, algorithm=how, random_state=seed % 2**32
        ).fit(embedding)
    return on_grid(unit(made.cluster_centers_))
