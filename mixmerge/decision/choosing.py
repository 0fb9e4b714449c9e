"""What the policies compute, as functions of arrays. Q queries, E experts, K picks a query."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
NOBODY = -1
# Relative: what is nearer than this differs by rounding, not by skill.
TIE = 1e-12
_CELLS = 4_194_304  # queries times experts looked at together: 32 MiB


def blocks(rows: int, experts: int) -> Iterator[slice]:
    """Slices of the queries, so that what a choice needs stays bounded."""
    step = max(1, _CELLS // max(1, experts))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def known(value: Floats) -> Floats:
    """The values, with minus infinity for those that are not finite: nobody picks them."""
    finite = np.isfinite(value)
    return value if finite.all() else np.where(finite, value, -np.inf)


def best(value: Floats, cost: Floats | None, order: Integers, *, k: int = 1) -> Integers:
    """``(Q, k)`` experts of the highest values, best first; ``NOBODY`` where fewer have one.

    Ties, up to ``TIE`` of the highest value, go to the cheaper expert, then to the first name. An expert
    without a cost counts as dearer than all others.

    Args:
        value: ``(Q, E)``, finite or minus infinity.
        cost: ``(Q, E)`` dollars, NaN where not known; None if no cost is.
        order: ``(E,)`` the experts sorted by name.
        k: from 1 to E.
    """
    picks = np.empty((len(value), k), np.int64)
    left, rows = (value.copy() if k > 1 else value), np.arange(len(value))
    for i in range(k):
        top = left.max(axis=1)
        near = left >= (top - TIE * np.abs(top))[:, None]
        found = left.argmax(axis=1)
        tied = np.flatnonzero(near.sum(axis=1) > 1)
        if tied.size:
            found[tied] = _cheaper(near[tied], None if cost is None else cost[tied], order)
        picks[:, i] = np.where(np.isfinite(left[rows, found]), found, NOBODY)
        if k > 1:
            left[rows, found] = -np.inf
    return picks


def _cheaper(near: NDArray[np.bool_], cost: Floats | None, order: Integers) -> Integers:
    """``(Q,)`` of the experts that are near the best, the cheapest; of these, the first by name."""
    candidates = near[:, order]
    if cost is not None:
        dollars = np.where(candidates & ~np.isnan(cost[:, order]), cost[:, order], np.inf)
        candidates = candidates & (dollars <= dollars.min(axis=1, keepdims=True))
    return np.asarray(order[candidates.argmax(axis=1)])


def at(values: Floats, picks: Integers) -> Floats:
    """``(Q,)`` values of one pick of each query; minus infinity for ``NOBODY``."""
    found = values[np.arange(len(values)), np.maximum(picks, 0)]
    return np.where(picks == NOBODY, -np.inf, found)


def next_best(value: Floats, picks: Integers) -> Floats:
    """``(Q,)`` the highest value of any expert but the picked one; NaN if there is no other."""
    others = value.copy()
    rows = np.flatnonzero(picks != NOBODY)
    others[rows, picks[rows]] = -np.inf
    top = others.max(axis=1)
    return np.where(np.isfinite(top), top, np.nan)


def sorted_draws(picks: Integers, mean: Floats, cost: Floats | None, rank: Integers) -> Integers:
    """``(Q, K)`` draws of each query, best expected score first; then the cheaper, then the first name.

    Args:
        picks: ``(Q, K)`` experts.
        mean, cost: ``(Q, E)``.
        rank: ``(E,)`` place of each expert when sorted by name.
    """
    rows = np.arange(len(picks))[:, None]
    dollars = np.zeros(picks.shape) if cost is None else cost[rows, picks]
    dollars = np.where(np.isnan(dollars), np.inf, dollars)
    order = np.lexsort((rank[picks], dollars, -mean[rows, picks]), axis=-1)
    return np.asarray(picks[rows, order])
