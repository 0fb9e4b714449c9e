"""Quality against cost: the curve of a router, its hull, and the area under it. Q queries, E experts, P points.

Source: Hu et al. (2024), RouterBench, arXiv 2403.12031: AIQ (section 3), non-decreasing convex hull, zero router and
willingness to pay. AIQ follows the definition there, not the released code, which divides by the largest cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.evaluate.choices import argmax_choice

Floats = NDArray[np.float64]
SETTINGS = 32


@dataclass(frozen=True, eq=False)
class Hull:
    """The best that settings reach, where a share of the queries may go to one and the rest to another.

    Args:
        cost: ``(P,)`` rising dollars a query.
        score: ``(P,)`` rising mean score; concave in cost.
    """

    cost: Floats
    score: Floats

    def at(self, cost: float) -> float:
        """Mean score for so many dollars: flat beyond the dearest setting, NaN below the cheapest."""
        if cost < self.cost[0]:
            return float("nan")
        return float(np.interp(cost, self.cost, self.score))

    def least_cost(self, score: float) -> float | None:
        """The fewest dollars that reach a mean score; None if nothing does."""
        if score > self.score[-1] + 1e-12:
            return None
        return float(np.interp(score, self.score, self.cost))


def hull(cost: Floats, score: Floats) -> Hull:
    """Non-decreasing convex hull of points: the upper concave envelope up to its highest point.

    Args:
        cost, score: ``(P,)``, finite, one or more.
    """
    kept: list[tuple[float, float]] = []
    for x, y in sorted(
        zip(cost.tolist(), score.tolist(), strict=True), key=lambda point: (point[0], -point[1])
    ):
        if kept and y <= kept[-1][1]:
            continue  # dearer and not better: the part that would fall
        while len(kept) > 1 and _not_above(kept[-2], kept[-1], (x, y)):
            kept.pop()
        kept.append((x, y))
    return Hull(np.array([x for x, _ in kept]), np.array([y for _, y in kept]))


def _not_above(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """``middle`` is on or below the line between its neighbours."""
    rise = (middle[1] - left[1]) * (right[0] - left[0])
    return rise <= (right[1] - left[1]) * (middle[0] - left[0])


def aiq(of: Hull, low: float, high: float) -> float:
    """Average improvement in quality: the mean height of the hull between two costs, in units of score.

    Args:
        low, high: the range of costs common to all that are compared (``common_range``). Beyond its dearest setting
            a hull goes on flat. A hull that starts above ``low`` counts as its first score from there.
    """
    if high <= low:
        return float("nan")
    inner = of.cost[(of.cost > low) & (of.cost < high)]
    cost = np.concatenate([[low], inner, [high]])
    score = np.interp(cost, of.cost, of.score)
    return float(((score[1:] + score[:-1]) / 2 * np.diff(cost)).sum() / (high - low))


def common_range(hulls: list[Hull]) -> tuple[float, float]:
    """From the lowest cost for which all of them answer, to the highest of any."""
    return max(float(one.cost[0]) for one in hulls), max(float(one.cost[-1]) for one in hulls)


def settings(
    mean: Floats, cost: Floats, experts: Sequence[str], *, number: int = SETTINGS
) -> list[NDArray[np.int64]]:
    """The choices of a router from no regard for cost to none for quality: ``(Q,)`` each.

    Each maximises ``mean - price * cost``. The prices of quality are 0, infinity, and in between equal-mass quantiles
    of those at which single queries would leave their cheapest expert: no scale has to be guessed. Ties go to the
    cheaper expert, then to the first name.

    Args:
        mean, cost: ``(Q, E)`` expected score and dollars, finite.
        number: of prices between the ends, 0 or more.
    """
    cheapest = argmax_choice(-cost, -mean, experts)
    rows = np.arange(len(mean))
    dearer = cost - cost[rows, cheapest][:, None]
    better = mean - mean[rows, cheapest][:, None]
    worth = (dearer > 0) & (better > 0)
    slopes = better[worth] / dearer[worth]
    prices = np.quantile(slopes, np.linspace(0, 1, number)) if slopes.size and number else np.empty(0)
    swept = [
        argmax_choice(mean - price * cost, cost, experts) for price in (0.0, *np.unique(prices).tolist())
    ]
    return [*swept, cheapest]
