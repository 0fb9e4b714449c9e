"""Means of few numbers, pulled towards what is known without them. G groups, E experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# A prior worth less or more than this many observations is noise in the estimate, not knowledge.
WEAKEST, STRONGEST = 0.5, 1e6


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
    total: Floats, count: Floats, prior: Floats, worth: Floats, variance: Floats
) -> tuple[Floats, Floats]:
    """Posterior mean and its standard deviation.

    Args:
        total, count: sum and number (or summed weights) of the observations, broadcast with the rest.
        prior: expected before seeing them.
        worth: how many observations the prior counts for.
        variance: of one observation.
    """
    mean = (total + worth * prior) / (count + worth)
    return mean, np.sqrt(variance / (count + worth))
