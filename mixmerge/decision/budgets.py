"""The price of a point of score with which the mean cost stays within a budget. Q queries, E experts, G trades."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from mixmerge.decision.calibration import Calibrated, aligned, known_costs, measured
from mixmerge.decision.choosing import Floats, Integers
from mixmerge.decision.policies import Policy
from mixmerge.decision.records import Scores
from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable

Bound = Literal["normal", "bernstein"]
BOUNDS: tuple[Bound, ...] = ("normal", "bernstein")
# Dollars for a point of score, from less than any expert costs to more than any: fixed before the data is seen,
# which is what the choice among them rests on. Between two neighbours, shares of the queries in 32 steps.
GRID: Floats = 2.0 ** np.arange(-60, 30.001, 1 / 8)
STEPS = 32


@dataclass(frozen=True, eq=False)
class _Path:
    """What is spent at each trade of the grid: mean and mean square of the dollars of a query, ``(G,)`` each."""

    mean: Floats
    square: Floats


def calibrate_budget(
    scores: Scores,
    table: OutcomeTable,
    *,
    budget: float,
    confidence: float = 0.95,
    bound: Bound = "normal",
    most: float | None = None,
    fallback: str | None = None,
    abstain_below: float | None = None,
    seed: int = 0,
) -> Calibrated:
    """The policy of kind ``budget`` that spends as much as it may: its mean cost stays within the budget.

    Each query goes to the highest ``trade * expected score - expected cost``, the Lagrangian of the best mean
    score for a mean cost. The trades of ``GRID`` are gone through from the lowest, with mixtures of neighbours
    between them, as long as the upper confidence bound of the mean recorded cost is within the budget; the last
    of these is taken. As the order is fixed beforehand and the first that fails ends it, the bound holds for the
    one taken with the confidence of a single test.

    Source: fixed-sequence testing as in Learn then Test (Angelopoulos et al., 2021, arXiv 2110.01052); ``bernstein``:
    Maurer and Pontil, Empirical Bernstein Bounds and Sample Variance Penalization (COLT 2009, arXiv 0907.3740),
    theorem 4.

    Args:
        scores: of the calibration queries, with expected costs of all experts.
        table: their outcomes, in the same order; a cost that is not recorded counts as the router expects it.
        budget: mean dollars a query, above 0.
        confidence: that the mean cost of further queries of the same kind is within the budget.
        bound: ``normal``: mean plus normal quantile times standard error, right for many rows and somewhat low for
            few of very uneven costs. ``bernstein``: right for any number of rows if no query costs more than
            ``most``; wider.
        most: dollars that no query costs more than; for ``bernstein``, the highest recorded cost by default.
        fallback, abstain_below: as in ``Policy``; what abstaining saves, and the fallback costs, is counted.
        seed: of the policy, which decides the mixture by it and the queries' ids.

    Raises:
        MixmergeError: a budget below the cheapest expert, or too near it for so few rows; costs that are not
            known.
    """
    faults = []
    if not (math.isfinite(budget) and budget > 0):
        faults.append(Fault("budget", f"is {budget}", "Dollars above 0"))
    if not 0 < confidence < 1:
        faults.append(Fault("confidence", f"is {confidence}", "Between 0 and 1"))
    if bound not in BOUNDS:
        faults.append(Fault("bound", f"is {bound!r}", " or ".join(BOUNDS)))
    if len(scores) < 2:
        faults.append(Fault("outcomes", f"have {len(scores)} rows", "2 or more"))
    if faults:
        raise MixmergeError(faults)
    table = aligned(scores, table)
    plain = Policy(kind="budget", budget=budget, trade=0.0, seed=seed).but(
        fallback=fallback, abstain_below=abstain_below
    )
    plain.choose(scores)  # raises for what it cannot decide on
    expected = np.zeros(0) if scores.cost is None else scores.cost
    if not np.isfinite(scores.mean).all():
        raise MixmergeError(Fault("scores", "are not all finite"))
    spent = _spent(scores, table, plain)
    path = _path(scores.mean, expected, spent)
    ceiling = float(spent.max()) if most is None else most
    place, share = _last_within(path, len(scores), budget, confidence, bound, ceiling)
    trade, above = float(GRID[place]), float(GRID[min(place + 1, len(GRID) - 1)])
    mixed = {"above": above, "share": share} if share else {}
    policy = Policy(**{**plain.as_dict(), "trade": trade, **mixed})
    goal = f"mean cost of at most ${budget:g} a query"
    done = measured(policy, scores, table, goal=goal, confidence=confidence)
    mean, square = _mix(path, place, share)
    said = f"one-sided {bound} bound at {confidence:.4g} on {len(scores)} rows"
    if bound == "bernstein":
        said += f", no query costing more than ${ceiling:g}"
    limit = float(_upper(mean, square, len(scores), confidence, bound, ceiling))
    return done.model_copy(update={"cost": float(mean), "cost_bound": limit, "bound": said})


def _spent(scores: Scores, table: OutcomeTable, policy: Policy) -> Floats:
    """``(Q, E)`` dollars if the expert is the rule's choice: nothing, or the fallback's, where that abstains."""
    costs = known_costs(scores, table)
    if costs is None:
        raise MixmergeError(Fault("outcomes", "have no costs", run="Add costs, or tokens and prices"))
    if policy.abstain_below is None:
        return costs
    instead = (
        np.zeros((len(costs), 1))
        if policy.fallback is None
        else costs[:, [scores.experts.index(policy.fallback)]]
    )
    return np.where(scores.mean < policy.abstain_below, instead, costs)


def _path(mean: Floats, cost: Floats, spent: Floats) -> _Path:
    """What is spent at each trade of ``GRID``.

    As the trade rises, each query moves up the upper envelope of its experts' lines ``trade * mean - cost``, from
    the cheapest expert to the best. All moves of all queries are found, then summed up to each trade.
    """
    rows = np.arange(len(mean))
    now = np.lexsort((-mean, cost), axis=-1)[:, 0]
    dollars = spent[rows, now]
    first, second = [float(dollars.sum())], [float((dollars**2).sum())]
    when: list[Floats] = []
    changes: list[tuple[Floats, Floats]] = []
    active = rows
    while active.size:
        trade, then = _next_move(mean[active], cost[active], now[active])
        moving = np.isfinite(trade)
        active, trade, then = active[moving], trade[moving], then[moving]
        before, after = spent[active, now[active]], spent[active, then]
        when.append(trade)
        changes.append((after - before, after**2 - before**2))
        now[active] = then
    trades = np.concatenate([np.empty(0), *when])
    order = np.argsort(trades, kind="stable")
    # A move at exactly a trade is not made there: ties go to the cheaper expert.
    made = np.searchsorted(trades[order], GRID, side="left")
    moments = []
    for start, i in ((first, 0), (second, 1)):
        steps = np.concatenate([np.empty(0), *(change[i] for change in changes)])[order]
        moments.append(np.cumsum(np.append(start, steps))[made] / len(mean))
    return _Path(moments[0], moments[1])


def _next_move(mean: Floats, cost: Floats, now: Integers) -> tuple[Floats, Integers]:
    """``(Q,)`` the trade at which another expert overtakes the present one, infinite if none does; and which."""
    rows = np.arange(len(mean))
    better = mean - mean[rows, now][:, None]
    dearer = cost - cost[rows, now][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        trade = np.where(better > 0, dearer / better, np.inf)
    soonest = trade.min(axis=1)
    # of those that overtake together the best, or the next move would be at the same trade
    then = np.where(trade <= soonest[:, None], mean, -np.inf).argmax(axis=1)
    return np.asarray(soonest), np.asarray(then)


def _mix(path: _Path, place: int | Integers, share: float | Floats) -> tuple[Floats, Floats]:
    """Mean and mean square where that share of the queries is decided at the next trade of the grid."""
    after = np.minimum(np.asarray(place) + 1, len(GRID) - 1)
    mean = (1 - share) * path.mean[place] + share * path.mean[after]
    square = (1 - share) * path.square[place] + share * path.square[after]
    return np.asarray(mean), np.asarray(square)


def _upper(mean: Floats, square: Floats, rows: int, confidence: float, bound: Bound, most: float) -> Floats:
    """The upper confidence bound of a mean."""
    variance = np.maximum(square - mean**2, 0.0) * rows / (rows - 1)
    if bound == "normal":
        return np.asarray(mean + NormalDist().inv_cdf(confidence) * np.sqrt(variance / rows))
    likely = math.log(2 / (1 - confidence))
    return np.asarray(mean + np.sqrt(2 * variance * likely / rows) + 7 * most * likely / (3 * (rows - 1)))


def _last_within(
    path: _Path, rows: int, budget: float, confidence: float, bound: Bound, most: float
) -> tuple[int, float]:
    """The last trade of the grid, and the share of the next one, before the bound first exceeds the budget."""
    places = np.repeat(np.arange(len(GRID)), STEPS)
    shares = np.tile(np.arange(STEPS) / STEPS, len(GRID))
    mean, square = _mix(path, places, shares)
    fails = _upper(mean, square, rows, confidence, bound, most) > budget
    last = int(fails.argmax()) - 1 if fails.any() else len(fails) - 1
    if last < 0:
        least = float(path.mean[0])
        if least > budget:
            what = f"${budget:g} is less than the cheapest experts cost, ${least:.4g} a query"
            raise MixmergeError(Fault("budget", what, f"More than ${least:.4g}"))
        needed = float(_upper(path.mean[0], path.square[0], rows, confidence, bound, most))
        what = f"{rows} rows do not show with {confidence:.4g} confidence that the cheapest experts keep ${budget:g}"
        raise MixmergeError(Fault("budget", what, f"At least ${needed:.4g}", "Or calibrate on more rows"))
    place, share = int(places[last]), float(shares[last])
    if share and path.mean[place] == path.mean[min(place + 1, len(GRID) - 1)]:
        share = 0.0
    if not share:  # the lowest trade that decides the same
        same = (path.mean == path.mean[place]) & (path.square == path.square[place])
        place = int(np.flatnonzero(same[: place + 1])[0]) if same[: place + 1].any() else place
    return place, share
