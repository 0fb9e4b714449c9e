"""Scores of the most similar queries. Q queries, N stored ones, E experts, D dimensions, k neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from mixmerge.routers.base import Floats, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.draws import some
from mixmerge.routers.search import FLAT_ROWS, Rows, in_parts, lay_out
from mixmerge.routers.shrinkage import NOTHING, STRONGEST, moments, shrink
from mixmerge.routers.stores import Store, best_worth, matched, weights
from mixmerge.routers.trained import text_hashes

_WORTHS = (*(0.5 * 2.0**i for i in range(16)), STRONGEST)  # what is tried
_TRIED_ON = 2_000  # stored queries they are tried on


class NearestOptions(Options):
    """Which neighbours count how much.

    Args:
        k: how many, 1 to 1,000.
        temperature: a neighbour counts for exp(cosine / temperature); all the same if not given.
        worth: neighbours that an expert's mean counts for, 0 or more. By default the number with which the stored
            queries are best predicted from their neighbours, for each expert.
        flat_rows: most stored queries that are all compared with; above, an inverted file is searched.
        recall: share of the k nearest that must be found there.
        excerpt: characters of each stored query kept for explanations.
    """

    k: int = Field(40, ge=1, le=1_000)
    temperature: float | None = Field(None, gt=0)
    worth: float | None = Field(None, ge=0)
    flat_rows: int = Field(FLAT_ROWS, ge=100)
    recall: float = Field(0.95, gt=0, lt=1)
    excerpt: int = Field(120, ge=0)


class NearestRouter(Router):
    """Mean score of the ``k`` nearest queries by cosine, shrunk to the expert's mean.

    A neighbour on which an expert has no score tells nothing about it: it leaves that expert nearer its mean, and
    less certain. Experts of one table share a store of queries. One that is added later shares it if it was asked
    at least half of its queries and no others; else it gets a store of its own, in which its neighbours are
    looked for. Either way the others' scores stay as they were.
    """

    kind = "knn"
    options_type = NearestOptions
    independent = True
    per_expert = ("store", "mean", "variance", "seen", "worth")
    options: NearestOptions
    _opened: tuple[State, dict[str, Store]] | None = None  # of the last state that was asked

    def learn(self, data: Training) -> State:
        return self._store(data, "0")

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        arrays, embedding = state.arrays, inputs.embedded()
        mean, std = np.empty((2, len(inputs), len(arrays["mean"])))

        def one_store(store: Store, at: Rows, part: slice) -> None:
            similarity, rows = store.index.search(embedding[part], self.options.k)
            total, count = store.evidence(weights(similarity, rows, self.options.temperature), rows)
            prior, worth, variance, seen = (
                arrays[what][at] for what in ("mean", "worth", "variance", "seen")
            )
            mean[part, at], std[part, at] = shrink(total, count, prior, worth, variance, seen=seen)

        for name, store in self._stores(state).items():
            work = partial(one_store, store, _columns(state, name))
            in_parts(work, len(inputs), parallel=store.index.parallel)
        return Prediction(mean, std)

    def extend(self, state: State, data: Training) -> State:
        asked = text_hashes(data.inputs.texts)
        for name in state.values["stores"]:
            score = matched(state.arrays[f"{name}.texts"], asked, data.score)
            if score is not None:
                place = f"{name}.score"
                both = np.concatenate([state.arrays[place], score.astype(np.float32)], axis=1)
                behind = self._behind(state, self._experts(data.score, name))
                return self._weighed(replace(state, arrays={**state.arrays, place: both, **behind}), name)
        more = self._store(data, str(1 + max(map(int, state.values["stores"]))))
        stores = {**state.values["stores"], **more.values["stores"]}
        return State({**state.arrays, **more.arrays, **self._behind(state, more.arrays)}, {"stores": stores})

    def without(self, state: State, at: int) -> State:
        name = str(state.arrays["store"][at])
        column = int(np.flatnonzero(_columns(state, name) == at)[0])
        left = super().without(state, at)
        score = np.delete(left.arrays[f"{name}.score"], column, axis=1)
        if score.shape[1]:
            return replace(left, arrays={**left.arrays, f"{name}.score": score})
        arrays = {what: array for what, array in left.arrays.items() if not what.startswith(f"{name}.")}
        stores = {other: about for other, about in left.values["stores"].items() if other != name}
        return State(arrays, {"stores": stores})

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        found: list[list[dict[str, Any]]] = [[] for _ in range(len(inputs))]
        for name, store in self._stores(state).items():
            experts = [self.experts[at] for at in _columns(state, name)]
            excerpts, scores = state.values["stores"][name]["excerpts"], state.arrays[f"{name}.score"]
            similarity, rows = store.index.search(inputs.embedded(), min(top, self.options.k))
            for said, near, places in zip(found, similarity.tolist(), rows.tolist(), strict=True):
                for cosine, row in zip(near, places, strict=True):
                    if row >= 0:
                        known = zip(experts, scores[row].tolist(), strict=True)
                        listed = {expert: score for expert, score in known if score == score}
                        said.append({"query": excerpts[row], "similarity": cosine, "scores": listed})
        return [
            {"neighbours": sorted(said, key=lambda one: -one["similarity"])[:top], "of": self.options.k}
            for said in found
        ]

    def _store(self, data: Training, name: str) -> State:
        """A state of one store."""
        options, keys = self.options, text_hashes(data.inputs.texts)
        layout = lay_out(
            data.inputs.embedded(),
            keys,
            k=options.k,
            recall=options.recall,
            flat_rows=options.flat_rows,
            seed=self.seed,
        )
        kept = {
            **layout.arrays,
            "texts": keys[layout.order],
            "score": data.score[layout.order].astype(np.float32),
        }
        excerpts = [data.inputs.texts[row][: options.excerpt] for row in layout.order]
        about = {"probes": layout.probes, "recall": layout.recall, "excerpts": excerpts}
        arrays = {
            **{f"{name}.{what}": array for what, array in kept.items()},
            **self._experts(data.score, name),
        }
        return self._weighed(State(arrays, {"stores": {name: about}}), name)

    def _experts(self, score: Floats, name: str) -> dict[str, Any]:
        """What is known of the experts of a store; a worth that is to be found is NaN."""
        mean, variance, seen = moments(score)
        worth = np.nan if self.options.worth is None else max(self.options.worth, NOTHING)
        store, worths = np.full(len(mean), int(name)), np.full(len(mean), worth)
        return {"store": store, "mean": mean, "variance": variance, "seen": seen, "worth": worths}

    def _behind(self, state: State, more: Mapping[str, Any]) -> dict[str, Any]:
        return {what: np.append(state.arrays[what], more[what]) for what in self.per_expert}

    def _weighed(self, state: State, name: str) -> State:
        """With the worths found that are NaN, all of experts of that store."""
        worth, at = state.arrays["worth"].copy(), _columns(state, name)
        if np.isnan(worth).any():
            found = self._worth(state, name)
            worth[at] = np.where(np.isnan(worth[at]), found, worth[at])
        return replace(state, arrays={**state.arrays, "worth": worth})

    def _worth(self, state: State, name: str) -> Floats:
        """``(e,)`` of a store's experts: each of some stored queries is predicted from the others."""
        store, score = _open(state, name), state.arrays[f"{name}.score"].astype(np.float64)
        places = some(state.arrays[f"{name}.texts"], at_most=_TRIED_ON, seed=self.seed)
        embedding = state.arrays[f"{name}.embedding"][places].astype(np.float32)
        similarity, rows = store.index.search(embedding, self.options.k + 1)
        rows = _others(rows, places)
        total, count = store.evidence(weights(similarity, rows, self.options.temperature), rows)
        mean, _, number = moments(score)
        actual = score[places]
        left = (number * mean - np.nan_to_num(actual)) / np.maximum(number - 1, 1)
        return best_worth(total, count, actual, np.where(number > 1, left, mean), _WORTHS)

    def _stores(self, state: State) -> dict[str, Store]:
        """Opened once for a state: that takes longer than a query."""
        if self._opened is None or self._opened[0] is not state:
            self._opened = (state, {name: _open(state, name) for name in state.values["stores"]})
        return self._opened[1]


def _open(state: State, name: str) -> Store:
    return Store.open(state.arrays, name, state.values["stores"][name]["probes"])


def _columns(state: State, name: str) -> Rows:
    """``(e,)`` places of the experts that have scores in a store, in the order of its columns."""
    return np.flatnonzero(state.arrays["store"] == int(name))


def _others(rows: Rows, itself: Rows) -> Rows:
    """``(Q, k + 1)`` neighbours of stored queries without the query: -1 in its place, or in the last if it has none."""
    own = rows == itself[:, None]
    own[~own.any(axis=1), -1] = True
    return np.where(own, -1, rows)
