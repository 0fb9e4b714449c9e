"""What choices are worth: pure functions of arrays. Q queries, E experts.

A choice is the index of an expert, -1 where a router abstains. A score that is not known is NaN; what depends on it is
NaN too and left out of means, never taken for 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.choosing import best, known
from mixmerge.outcomes.table import column_means

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]
CONSTANT_SHARE = 0.98  # a router that sends more to one expert hardly routes
NOISY_SHARE = 0.95  # more choices than this by less than their uncertainty are chance
STILL = 0.02  # predictions that vary by less than this part of what they predict say nothing


def of_choice(values: Floats, choice: Choice) -> Floats:
    """``(Q,)`` values of the chosen experts; NaN where there is no choice."""
    found = values[np.arange(len(choice)), np.maximum(choice, 0)]
    return np.where(choice >= 0, found, np.nan)


def argmax_choice(mean: Floats, cost: Floats | None, experts: Sequence[str]) -> Choice:
    """The best expected score; ties to the lower cost, then to the first name; -1 where nothing is expected."""
    return best(known(mean), cost, np.argsort(np.asarray(experts)))[:, 0]


def best_choice(score: Floats, cost: Floats | None, experts: Sequence[str]) -> Choice:
    """The query oracle: the best known score, ties as there; -1 where no score is known."""
    return argmax_choice(score, cost, experts)


def cheapest_choice(cost: Floats, experts: Sequence[str]) -> Choice:
    """The expert that is cheapest on average over ``(Q, E)`` dollars, for every query; -1 if no cost is known."""
    return np.full(len(cost), argmax_choice(-column_means(cost)[None], None, experts)[0], np.int64)


def group_choice(score: Floats, cost: Floats | None, experts: Sequence[str], groups: Sequence[str]) -> Choice:
    """The oracle of groups (tasks): on each the expert with the best mean there; ties to the lower mean cost."""
    choice, of = np.full(len(score), -1, np.int64), np.asarray(groups, object)
    for group in sorted(set(groups)):
        rows = of == group
        mean = column_means(score[rows])[None]
        price = None if cost is None else column_means(cost[rows])[None]
        choice[rows] = best_choice(mean, price, experts)[0]
    return choice


def row_means(values: Floats) -> Floats:
    """``(Q,)`` means of the known values of each row: what a random choice among them scores on average."""
    return column_means(values.T)


def regret(score: Floats, actual: Floats) -> Floats:
    """``(Q,)``: best known score minus the one that was got; 0 or more."""
    top = known(score).max(axis=1)
    return np.asarray(np.where(np.isfinite(top), top, np.nan) - actual, np.float64)


def shares(choice: Choice, experts: int) -> Floats:
    """``(E,)`` parts of the queries with a choice that go to each expert; zeros if there are none."""
    counts = np.bincount(choice[choice >= 0], minlength=experts).astype(np.float64)
    return np.asarray(counts / max(1.0, counts.sum()), np.float64)


def entropy(share: Floats) -> float:
    """Of shares, as a part of the largest possible: 0 for one expert always, 1 for all equally often."""
    if len(share) < 2:
        return 0.0
    used = share[share > 0]
    return float(-(used * np.log(used)).sum() / np.log(len(share))) + 0.0


@dataclass(frozen=True)
class Degeneracy:
    """Signs that a router does not route.

    Args:
        share: of the most chosen expert.
        within_std: part of the choices whose lead over the runner-up is smaller than the standard deviation of that
            lead; NaN if the router states no uncertainty.
        moves: how much the predicted lead of the most chosen expert over the next one varies over queries, as a part
            of how much the real one varies; NaN if that is not known.
    """

    share: float
    within_std: float
    moves: float

    def warnings(self) -> list[str]:
        """One sentence for each sign that is there."""
        found = []
        if self.share > CONSTANT_SHARE:
            found.append(f"sends {self.share:.1%} of the queries to one expert: almost a constant")
        elif self.within_std > NOISY_SHARE:
            found.append(
                f"decides {self.within_std:.0%} of the queries by leads below their own standard deviation"
            )
        if self.share <= CONSTANT_SHARE and self.moves < STILL:
            found.append(
                f"its scores hardly depend on the query: leads vary {self.moves:.1%} as much as the real ones, "
                "so differences at the level of noise decide"
            )
        return found


def degeneracy(mean: Floats, std: Floats, score: Floats, choice: Choice) -> Degeneracy:
    """Whether choices come from the queries or from next to nothing.

    Args:
        mean, std: ``(Q, E)`` as a router gives them.
        score: ``(Q, E)`` known outcomes.
        choice: ``(Q,)``.
    """
    share = shares(choice, mean.shape[1])
    top = float(share.max()) if share.size else float("nan")
    if mean.shape[1] < 2 or len(mean) < 2:
        return Degeneracy(top, float("nan"), float("nan"))
    order = np.argsort(-mean, axis=1, kind="stable")[:, :2]
    rows = np.arange(len(mean))[:, None]
    lead, spread = mean[rows, order] @ np.array([1.0, -1.0]), np.sqrt((std[rows, order] ** 2).sum(axis=1))
    within = float((lead < spread).mean()) if (spread > 0).any() else float("nan")
    first, second = np.argsort(-share, kind="stable")[:2]
    real = score[:, first] - score[:, second]
    real = real[~np.isnan(real)]
    spread_of_real = float(real.std()) if len(real) > 1 else 0.0
    predicted = float((mean[:, first] - mean[:, second]).std())
    return Degeneracy(top, within, predicted / spread_of_real if spread_of_real > 0 else float("nan"))


@dataclass(frozen=True)
class Optimality:
    """Beside the query oracle, which takes the cheapest of the best.

    Source: the optimal selection, cost and accuracy scores of RouterArena (arXiv 2510.00202), as its leaderboard
    defines them. Queries that no expert solves (best score 0 or less) count in none of them. Deviations: scores need
    not be right or wrong; dollars are summed before they are divided, and only where the choice was a best one
    (there: the mean of the queries' ratios, wherever some expert is right).

    Args:
        selection: part of the queries where a best expert was chosen, and with known costs the cheapest of them.
        cost_ratio: dollars of the oracle over dollars of the choices, where the choice was a best one; 1 is optimal.
            NaN without costs.
        score_ratio: mean score over the oracle's.
    """

    selection: float
    cost_ratio: float
    score_ratio: float


def optimality(score: Floats, cost: Floats | None, choice: Choice) -> Optimality:
    """How often the choice could not have been better, and what the others cost."""
    actual = of_choice(score, choice)
    top = regret(score, np.zeros(len(score)))
    counted = ~np.isnan(actual) & (top > 0)
    if not counted.any():
        return Optimality(float("nan"), float("nan"), float("nan"))
    right = counted & (actual == top)
    ratio, optimal = float("nan"), right
    if cost is not None:
        lowest = np.where(score == top[:, None], np.where(np.isnan(cost), np.inf, cost), np.inf).min(axis=1)
        paid = of_choice(cost, choice)
        priced = right & ~np.isnan(paid) & np.isfinite(lowest)
        optimal = right & ~(priced & (paid > lowest))
        if priced.any() and paid[priced].sum() > 0:
            ratio = float(lowest[priced].sum() / paid[priced].sum())
    return Optimality(
        float(optimal.sum() / counted.sum()), ratio, float(actual[counted].sum() / top[counted].sum())
    )


def stays(before: Choice, after: Choice) -> float:
    """Part of the queries whose choice is the same: robustness, if ``after`` is of changed wordings."""
    return float((before == after).mean()) if len(before) else float("nan")
