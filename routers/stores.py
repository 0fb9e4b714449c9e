"""Stored queries with the scores some experts have on them. Q queries, N stored ones, e experts, k neighbours.

Arrays of a store are in a router's state under ``<its name>.<what>``: those of a ``search.Layout``, ``texts``
``(N,)`` hashes, and ``score`` ``(N, e)`` float32, NaN where missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.kernels import loops
from mixmerge.routers.base import Embedding, Floats
from mixmerge.routers.draws import Keys
from mixmerge.routers.search import LAYOUT, Index, Rows

COVERAGE = 0.5  # of a store's queries, from which an added expert shares it


@dataclass(frozen=True, eq=False)
class Store:
    """A store, opened.

    Args:
        index: of the embeddings.
        score: ``(N, e)`` float32, 0 where missing.
        known: ``(N, e)`` float32, 1 where there is a score; None if there are all.
    """

    index: Index
    score: Embedding
    known: Embedding | None

    @classmethod
    def open(cls, arrays: Mapping[str, NDArray[Any]], name: str, probes: int) -> Store:
        score = arrays[f"{name}.score"]
        missing = np.isnan(score)
        parts = {what: arrays[f"{name}.{what}"] for what in LAYOUT}
        if not missing.any():
            return cls(Index(parts, probes), score, None)
        return cls(
            Index(parts, probes), np.where(missing, np.float32(0), score), (~missing).astype(np.float32)
        )

    def evidence(self, weight: Embedding, rows: Rows) -> tuple[Floats, Floats]:
        """Weighted sum, and sum of the weights, of the known scores of neighbours: ``(Q, e)`` each.

        Args:
            weight: ``(Q, k)`` float32.
            rows: ``(Q, k)`` places; where one is -1, its weight is 0.
        """
        total = self._sums(rows, weight, self.score)
        if self.known is None:
            return total, np.repeat(weight.sum(axis=1, dtype=np.float64)[:, None], total.shape[1], axis=1)
        return total, self._sums(rows, weight, self.known)

    def _sums(self, rows: Rows, weight: Embedding, values: Embedding) -> Floats:
        sums = np.empty((len(rows), values.shape[1]), np.float32)
        loops.weighted_sums(np.ascontiguousarray(rows), weight, np.ascontiguousarray(values), sums)
        return sums.astype(np.float64)


def matched(stored: Keys, asked: Keys, score: Floats) -> Floats | None:
    """Scores on the stored queries, ``(N, e)``, NaN where there is none; None if the store does not fit them.

    It fits if it has all the texts asked, and they are at least ``COVERAGE`` of its own. A text that was asked twice
    has its last score.

    Args:
        stored: ``(N,)`` hashes of the store's texts.
        asked: ``(Q,)`` hashes of the texts of ``score``.
        score: ``(Q, e)``.
    """
    place = {text: row for row, text in enumerate(asked.tolist())}
    at = np.array([place.get(text, -1) for text in stored.tolist()], np.int64)
    if not set(place) <= set(stored.tolist()) or (at >= 0).mean() < COVERAGE:
        return None
    return np.where((at >= 0)[:, None], score[at], np.nan)


def weights(similarity: Embedding, rows: Rows, temperature: float | None) -> Embedding:
    """``(Q, k)`` weights, whose sum is the number of equal ones that would tell as much; 0 where there is no row.

    Args:
        similarity: ``(Q, k)`` cosines.
        rows: ``(Q, k)`` places, -1 where there is none.
        temperature: a neighbour counts for exp(cosine / temperature); all the same if None.
    """
    there = rows >= 0
    if temperature is None:
        return there.astype(np.float32)
    similar = np.where(there, similarity.astype(np.float64), -np.inf)
    nearest = np.where(there.any(axis=1), similar.max(axis=1), 0.0)
    weight = np.exp((similar - nearest[:, None]) / temperature)
    squares = np.maximum((weight**2).sum(axis=1, keepdims=True), 1e-300)
    return np.asarray(weight * (weight.sum(axis=1, keepdims=True) / squares), np.float32)


def best_worth(total: Floats, count: Floats, actual: Floats, mean: Floats, tried: Sequence[float]) -> Floats:
    """Of the worths tried, the one whose shrunk means are nearest the actual scores; of equals the most: ``(e,)``.

    Args:
        total, count: ``(Q, e)`` evidence for each query, itself left out.
        actual: ``(Q, e)``, NaN where missing.
        mean: ``(Q, e)`` that it is shrunk to.
        tried: ascending.
    """
    falling = np.array(tried[::-1])
    errors = [np.nansum((actual - (total + w * mean) / (count + w)) ** 2, axis=0) for w in falling]
    best: Floats = falling[np.argmin(errors, axis=0)]
    return best
