"""Cost figures of every router on one table, over one range of costs. Q queries, E experts, P settings, B resamples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Scores
from mixmerge.evaluate.choices import Choice, of_choice
from mixmerge.evaluate.costs import Hull, aiq, common_range, hull, settings
from mixmerge.evaluate.intervals import bootstrap_means, compare, estimate, mean_of
from mixmerge.evaluate.measuring import Ground
from mixmerge.evaluate.records import CostFigures
from mixmerge.outcomes.table import column_means

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tradeoffs:
    """As in ``RoutingReport``, and the figures of each router that expects costs."""

    figures: Mapping[str, CostFigures]
    singles: Mapping[str, tuple[float, float]]
    zero: Hull | None
    cost_range: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class _Swept:
    """``(Q, P)`` known score and cost of each setting; NaN in both where either is unknown."""

    score: Floats
    cost: Floats

    @classmethod
    def of(cls, score: Floats, cost: Floats) -> _Swept:
        unknown = np.isnan(score) | np.isnan(cost)
        return cls(np.where(unknown, np.nan, score), np.where(unknown, np.nan, cost))

    def means(self) -> tuple[Floats, Floats]:
        return column_means(self.cost), column_means(self.score)


def tradeoffs(ground: Ground, scores: Mapping[str, Scores], best: Mapping[str, Choice]) -> Tradeoffs:
    """Curves of the routers that expect costs, if the table has any.

    Args:
        ground: what they are measured on.
        scores: router -> its scores.
        best: router -> ``(Q,)`` the best single expert it is compared with.
    """
    cost = ground.cost
    if cost is None:
        return Tradeoffs({}, {}, None, None)
    alone = _Swept.of(ground.table.score, cost)
    points = _points(*alone.means())
    if points is None:
        return Tradeoffs({}, {}, None, None)
    zero = hull(*points)
    singles = {
        name: (float(c), float(s))
        for name, c, s in zip(ground.table.experts, *alone.means(), strict=True)
        if not np.isnan(c)
    }
    swept = {name: one for name, given in scores.items() if (one := _swept(ground, cost, given)) is not None}
    hulls = {
        name: hull(*found) for name, one in swept.items() if (found := _points(*one.means())) is not None
    }
    low, high = common_range([zero, *hulls.values()])
    figures = {
        name: _figures(ground, swept[name], alone, (hulls[name], zero), (low, high), best[name])
        for name in hulls
    }
    return Tradeoffs(figures, singles, zero, (low, high))


def _points(cost: Floats, score: Floats) -> tuple[Floats, Floats] | None:
    known = ~np.isnan(cost)
    return (cost[known], score[known]) if known.any() else None


def _swept(ground: Ground, cost: Floats, scores: Scores) -> _Swept | None:
    """What each setting of the price of quality would have got and paid; None if no costs are expected.

    Where the router expects none of an expert, what its price and the query's length let one expect will do.
    """
    own = np.array([ground.table.experts.index(name) for name in scores.experts])
    expected = ground.expected[:, own]
    if scores.cost is not None:
        expected = np.where(np.isfinite(scores.cost).all(axis=0), scores.cost, expected)
    priced = np.flatnonzero(np.isfinite(expected).all(axis=0))
    if not priced.size:
        return None
    at, names = own[priced], [scores.experts[e] for e in priced]
    chosen = [at[choice] for choice in settings(scores.mean[:, priced], expected[:, priced], names)]
    return _Swept.of(
        np.stack([of_choice(ground.table.score, choice) for choice in chosen], axis=1),
        np.stack([of_choice(cost, choice) for choice in chosen], axis=1),
    )


def _figures(
    ground: Ground,
    swept: _Swept,
    alone: _Swept,
    hulls: tuple[Hull, Hull],
    between: tuple[float, float],
    best: Choice,
) -> CostFigures:
    own, zero = hulls
    value, base = aiq(own, *between), aiq(zero, *between)
    drawn = _resampled(ground, swept, alone, between)
    score, cost = of_choice(alone.score, best), of_choice(alone.cost, best)
    at_cost, at_score = mean_of(cost), mean_of(score)
    least = None if np.isnan(at_score) else own.least_cost(at_score)
    mean_cost, mean_score = swept.means()
    return CostFigures(
        cost=mean_cost,
        score=mean_score,
        hull=own,
        aiq=estimate(value, drawn[:, 0], level=ground.level),
        over_zero=compare(value - base, drawn[:, 0] - drawn[:, 1], level=ground.level),
        saved=1 - least / at_cost if least is not None and at_cost > 0 else None,
        gained=own.at(at_cost) - at_score,
    )


def _resampled(ground: Ground, swept: _Swept, alone: _Swept, between: tuple[float, float]) -> Floats:
    """``(B, 2)`` AIQ of a router and of the zero router, the same queries drawn for both."""
    columns = np.concatenate([swept.cost, swept.score, alone.cost, alone.score], axis=1)
    means = bootstrap_means(columns, ground.groups, resamples=ground.resamples, seed=ground.seed)
    ends = np.cumsum([swept.cost.shape[1], swept.cost.shape[1], alone.cost.shape[1]])
    drawn = np.full((len(means), 2), np.nan)
    for b, row in enumerate(means):
        own_cost, own_score, cost, score = np.split(row, ends)
        for which, points in enumerate((_points(own_cost, own_score), _points(cost, score))):
            if points is not None:
                drawn[b, which] = aiq(hull(*points), *between)
    return drawn
