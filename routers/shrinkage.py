"""Means of few numbers, pulled towards what is known without them. Q queries, G groups, E experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# A prior worth less or more than this many observations is noise in the estimate, not knowledge.
WEAKEST, STRONGEST = 0.5, 1e6
NOTHING = 1e-9  # what a prior of no worth counts for: where nothing else is known, it still stands


def moments(score: Floats) -> tuple[Floats, Floats, Floats]:
    """Of every expert: mean, variance and number of its known scores; ``(E,)`` each, from ``(Q, E)``.

    An expert with one known score, or with all alike, gets the mean variance of the others, or a small one.
    """
    known = ~np.isnan(score)
    count = known.sum(axis=0).astype(np.float64)
    filled = np.where(known, score, 0.0)
    mean = filled.sum(axis=0) / np.maximum(count, 1)
    spread = (np.where(known, score - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count - 1, 1)
    usable = (count > 1) & (spread > 0)
    fallback = float(spread[usable].mean()) if usable.any() else 1e-4
    return mean, np.where(usable, spread, fallback), count


def strength(group_mean: Floats, group_count: Floats, mean: Floats, variance: Floats) -> Floats:
    """How many observations the prior is worth, for every expert: ``(E,)``.

    Empirical Bayes by moments: the spread of the groups' means is the noise of their sizes plus the variance
    between groups; the prior is worth variance within over variance between.

    Args:
        group_mean, group_count: ``(G, E)``; the mean of a group without observations counts for nothing.
        mean, variance: ``(E,)`` of all observations of an expert.
    """
    weight = group_count.sum(axis=0)
    between = (group_count * (group_mean - mean) ** 2).sum(axis=0)
    groups = (group_count > 0).sum(axis=0)
    size = weight - (group_count**2).sum(axis=0) / np.maximum(weight, 1)
    excess = (between - np.maximum(groups - 1, 0) * variance) / np.maximum(size, 1e-12)
    excess = np.where(groups > 1, excess, 0.0)
    return np.clip(variance / np.maximum(excess, 1e-12), WEAKEST, STRONGEST)


def shrink(
    total: Floats,
    count: Floats,
    prior: Floats,
    worth: Floats,
    variance: Floats,
    *,
    seen: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Posterior mean and its standard deviation.

    Args:
        total, count: sum and number (or summed weights) of the observations, broadcast with the rest.
        prior: expected before seeing them.
        worth: how many observations the prior counts for.
        variance: of one observation.
        seen: observations that the prior is the mean of: it is known no better than that. By default it is certain.
    """
    mean = (total + worth * prior) / (count + worth)
    spread = variance / (count + worth)
    if seen is not None:
        spread = spread + (worth / (count + worth)) ** 2 * variance / seen
    return mean, np.sqrt(spread)


def group_sums(score: Floats, group: NDArray[np.int64], groups: int) -> tuple[Floats, Floats]:
    """Sum and number of the known scores of every group: ``(G, E)`` each.

    Args:
        score: ``(Q, E)``, NaN where missing.
        group: ``(Q,)`` of every query, 0 to ``groups - 1``.
        groups: G.
    """
    total, count = np.zeros((groups, score.shape[1])), np.zeros((groups, score.shape[1]))
    for e, column in enumerate(score.T):
        known = ~np.isnan(column)
        count[:, e] = np.bincount(group[known], minlength=groups)
        total[:, e] = np.bincount(group[known], column[known], minlength=groups)
    return total, count


def grouped(
    score: Floats, group: NDArray[np.int64], groups: int, *, of: Floats, worth: float | None
) -> dict[str, Floats]:
    """What shrunk means of groups are made of: ``total`` and ``count`` ``(G, E)``; ``mean``, ``variance``, ``seen`` and
    ``worth`` ``(E,)``.

    Args:
        score, group, groups: as for ``group_sums``.
        of: ``(N, E)`` all scores of the experts, of queries without a group too.
        worth: observations that an expert's mean counts for, 0 or more; None estimates it.
    """
    total, count = group_sums(score, group, groups)
    mean, variance, seen = moments(of)
    estimated = strength(total / np.maximum(count, 1), count, mean, variance)
    given = estimated if worth is None else np.full_like(estimated, max(worth, NOTHING))
    return {"total": total, "count": count, "mean": mean, "variance": variance, "seen": seen, "worth": given}


@dataclass(frozen=True, eq=False)
class Line:
    """Every expert's score as a straight line of one number, its slope pulled towards 0.

    The slope of least squares is multiplied by F / (1 + F), where F is its square over the variance it is known with:
    a slope that noise explains as well all but goes, a sure one stays, none changes its sign.

    Args:
        mean, center: ``(E,)`` mean score, and mean of the number.
        slope: ``(E,)``, shrunk.
        spread: ``(E,)`` sum of squares of the number about ``center``.
        variance: ``(E,)`` of one score about the line.
        count: ``(E,)`` known scores.
    """

    mean: Floats
    center: Floats
    slope: Floats
    spread: Floats
    variance: Floats
    count: Floats

    names: ClassVar[tuple[str, ...]] = ("mean", "center", "slope", "spread", "variance", "count")

    @classmethod
    def fit(cls, number: Floats, score: Floats) -> Self:
        """The lines of all experts.

        Args:
            number: ``(Q, 1)``, or ``(Q, E)`` if it differs by expert.
            score: ``(Q, E)``, NaN where missing.
        """
        mean, variance, count = moments(score)
        known = ~np.isnan(score)
        center = np.where(known, number, 0.0).sum(axis=0) / np.maximum(count, 1)
        offset = np.where(known, number - center, 0.0)
        off_score = np.where(known, score - mean, 0.0)
        spread = (offset**2).sum(axis=0)
        straight = spread > 1e-12 * np.maximum(count, 1)
        slope = np.where(straight, (offset * off_score).sum(axis=0) / np.where(straight, spread, 1.0), 0.0)
        left = ((off_score - slope * offset) ** 2).sum(axis=0) / np.maximum(count - 2, 1)
        variance = np.where((count > 2) & (left > 0), left, variance)
        signal = slope**2 * spread / variance
        return cls(mean, center, slope * signal / (1 + signal), spread, variance, count)

    def at(self, number: Floats) -> tuple[Floats, Floats]:
        """Expected score and its standard deviation, ``(Q, E)`` each, at ``(Q, 1)`` or ``(Q, E)`` numbers."""
        offset = number - self.center
        lever = np.where(self.slope != 0, offset**2 / np.maximum(self.spread, 1e-12), 0.0)
        return self.mean + self.slope * offset, np.sqrt(
            self.variance * (1 / np.maximum(self.count, 1) + lever)
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays by their names, ``(E,)`` each."""
        return {name: getattr(self, name) for name in self.names}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The lines that ``arrays`` gave."""
        return cls(*(arrays[name] for name in cls.names))
