"""Scores by likeness to the queries an expert is best at. Q queries, P pilots, E experts, D dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers.base import Embedding, Floats, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.constants import LABELS, labels_of
from mixmerge.routers.features import unit
from mixmerge.routers.grid import on_grid
from mixmerge.routers.shrinkage import NOTHING, Line
from mixmerge.routers.trained import text_hashes

_LINE = "line."  # prefix of the arrays of the line


class PilotOptions(Options):
    """Which pilots there are and what they count for.

    Args:
        label: column of metadata with a pilot for each of its labels; by default ``task``, or else ``category``, or
            else none: one pilot for each expert.
        weight: ``queries``: a pilot counts for as many queries as it stands for, a tie shared; ``pilots``: each the
            same, as published.
    """

    label: str | None = None
    weight: Literal["queries", "pilots"] = "queries"


class PilotRouter(Router):
    """Mean cosine to an expert's pilots, which are the centroids of the queries of a label that it is best at.

    Source: Lee et al. (2024), RouterRetriever, arXiv 2409.02685, section 3 and algorithm 1. Nothing is trained.
    Deviations: the mean cosine becomes an expected score by a line for each expert, its slope shrunk (published: the
    highest mean wins); a tie for the best counts in part for each (published: for one), and pilots count by their
    queries. With ties in most rows, as in tables of
    right and wrong, all experts have a pilot of every label, and counted the same these would all but agree.

    Adding an expert takes its outcomes on queries the router was fitted on: where it ties with or beats the best
    score there was, its pilots come from. The others' pilots stay.
    """

    kind = "pilots"
    options_type = PilotOptions
    per_expert = tuple(_LINE + name for name in Line.names)
    options: PilotOptions

    def learn(self, data: Training) -> State:
        known = np.where(np.isnan(data.score), -np.inf, data.score)
        best = known.max(axis=1)
        ties = (known == best[:, None]).sum(axis=1)
        share = (known == best[:, None]) / ties[:, None]
        arrays, labels = self._pilots(data, share)
        seen = {"texts": text_hashes(data.inputs.texts), "best": best, "ties": ties}
        line = Line.fit(_likeness(arrays, data.inputs.embedded(), share.shape[1]), data.score)
        return State({**seen, **arrays, **_named(line)}, {"labels": labels})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        line = Line.of({name: state.arrays[_LINE + name] for name in Line.names})
        return Prediction(*line.at(_likeness(state.arrays, inputs.embedded(), len(line.mean))))

    def extend(self, state: State, data: Training) -> State:
        old, experts = state.arrays, len(state.arrays[self.per_expert[0]])
        place = {text: row for row, text in enumerate(old["texts"].tolist())}
        at = np.array([place.get(text, -1) for text in text_hashes(data.inputs.texts).tolist()], np.int64)
        if (at < 0).all():
            raise MixmergeError(
                Fault(
                    "router pilots",
                    "an expert is added by outcomes on queries the router was fitted on, and there are none",
                    run="Ask the expert some of them, or fit the router again",
                )
            )
        best, ties = old["best"][at][:, None], old["ties"][at][:, None]
        share = np.where(data.score > best, 1.0, np.where(data.score == best, 1 / (ties + 1), 0.0))
        more, labels = self._pilots(data, np.where((at >= 0)[:, None], share, 0.0))
        line = Line.fit(_likeness(more, data.inputs.embedded(), share.shape[1]), data.score)
        more = {**more, "expert": more["expert"] + experts, **_named(line)}
        joined = {name: np.concatenate([old[name], array]) for name, array in more.items()}
        return State({**old, **joined}, {"labels": [*state.values["labels"], *labels]})

    def without(self, state: State, at: int) -> State:
        left = super().without(state, at)
        expert = left.arrays["expert"]
        kept = np.flatnonzero(expert != at)
        arrays = {name: left.arrays[name][kept] for name in ("pilot", "weight")}
        arrays["expert"] = expert[kept] - (expert[kept] > at)
        return State({**left.arrays, **arrays}, {"labels": [left.values["labels"][p] for p in kept]})

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        arrays = state.arrays
        similar = _cosines(arrays, inputs.embedded())
        order = np.argsort(-similar, axis=1, kind="stable")[:, :top]
        return [
            {
                "pilots": [
                    {
                        "expert": self.experts[arrays["expert"][p]],
                        "label": state.values["labels"][p],
                        "similarity": float(cosines[p]),
                        "weight": float(arrays["weight"][p]),
                    }
                    for p in nearest
                ]
            }
            for cosines, nearest in zip(similar, order, strict=True)
        ]

    def _pilots(self, data: Training, share: Floats) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Pilots, and the label of each.

        Args:
            data: of the queries.
            share: ``(Q, E)`` of every query that counts for an expert.
        """
        column = _column(data, self.options.label)
        of, embedding = np.array(column, object), data.inputs.embedded()
        pilots, weights, experts, labels = [], [], [], []
        for label in sorted(set(column)):
            rows = np.flatnonzero(of == label)
            weight, centroids = share[rows].sum(axis=0), unit(share[rows].T @ embedding[rows])  # (E,), (E, D)
            for e in np.flatnonzero(weight > 0):
                pilots.append(centroids[e])
                weights.append(weight[e] if self.options.weight == "queries" else 1.0)
                experts.append(e)
                labels.append(label)
        return {
            "pilot": on_grid(np.reshape(pilots, (-1, embedding.shape[1]))).astype(np.float16),
            "weight": np.array(weights, np.float64),
            "expert": np.array(experts, np.int64),
        }, labels


def _cosines(arrays: Mapping[str, NDArray[Any]], embedding: Embedding) -> Embedding:
    """``(Q, P)``."""
    return on_grid(embedding) @ arrays["pilot"].astype(np.float32).T


def _likeness(arrays: Mapping[str, NDArray[Any]], embedding: Embedding, experts: int) -> Floats:
    """``(Q, E)`` mean cosine to the pilots of every expert; 0 for one that has none."""
    share = np.zeros((len(arrays["pilot"]), experts))
    share[np.arange(len(share)), arrays["expert"]] = arrays["weight"]
    share /= np.maximum(share.sum(axis=0), NOTHING)
    return _cosines(arrays, embedding).astype(np.float64) @ share


def _named(line: Line) -> dict[str, NDArray[Any]]:
    return {_LINE + name: array for name, array in line.arrays().items()}


def _column(data: Training, label: str | None) -> Sequence[str]:
    """The labels of the queries; all the same if the outcomes have none and none were asked for."""
    metadata = data.inputs.metadata
    if label is None and not any(any(metadata.get(name, ())) for name in LABELS):
        return ("",) * len(data.inputs)
    return labels_of(metadata, label, needed_by="router pilots")[1]
