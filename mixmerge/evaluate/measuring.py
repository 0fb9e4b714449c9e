"""From choices to rows of the table: every figure of every row on the same resampled queries.

Q queries, E experts, K picks, D draws, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.evaluate.baselines import best_single_of, constant, random_choices
from mixmerge.evaluate.calibration import Calibration
from mixmerge.evaluate.choices import (
    Choice,
    best_choice,
    cheapest_choice,
    entropy,
    group_choice,
    of_choice,
    optimality,
    regret,
    row_means,
    shares,
)
from mixmerge.evaluate.intervals import (
    Comparison,
    Estimate,
    bootstrap_means,
    compare,
    estimate,
    groups_of,
    mean_of,
)
from mixmerge.evaluate.records import CostFigures, Detail, Row
from mixmerge.outcomes.table import OutcomeTable, column_means

Floats = NDArray[np.float64]
RANDOM, CHEAPEST = "random choice", "cheapest"
TASK_ORACLE, QUERY_ORACLE = "task oracle", "query oracle"


@dataclass(frozen=True, eq=False)
class Ground:
    """What all rows are measured on.

    Args:
        table: every query with a known score.
        queries: the same, Q.
        cost: ``(Q, E)`` dollars, NaN where not known; None if none is.
        expected: ``(Q, E)`` dollars to expect of experts whose costs are estimated, NaN for the others.
        groups: ``(Q,)`` of queries with the same text.
        seed, resamples, level: of the intervals.
    """

    table: OutcomeTable
    queries: tuple[Query, ...]
    cost: Floats | None
    expected: Floats
    groups: NDArray[np.int64]
    seed: int
    resamples: int
    level: float

    @classmethod
    def of(
        cls,
        table: OutcomeTable,
        queries: tuple[Query, ...],
        expected: Floats,
        *,
        seed: int,
        resamples: int,
        level: float,
    ) -> Ground:
        groups = groups_of(table.queries)
        return cls(table, queries, table.costs(), expected, groups, seed, resamples, level)


@dataclass(frozen=True, eq=False)
class Chosen:
    """What one row chose.

    Args:
        name, role: as in ``Row``.
        picks: ``(Q, K)`` best first, -1 for none.
        best: ``(Q,)`` the best single expert it is compared with; None for that row itself.
        expected: ``(Q,)`` score that was expected of the first pick; NaN for constants.
        draws: ``(D, Q)`` in place of picks, for a row that is the mean of draws.
        against: names of further rows to compare with.
        extra: what only routers have.
    """

    name: str
    role: str
    picks: NDArray[np.int64]
    best: Choice | None
    expected: Floats | None = None
    draws: NDArray[np.int64] | None = None
    against: tuple[str, ...] = ()
    extra: Extra = field(default_factory=lambda: Extra())

    def first(self) -> Choice:
        return self.picks[:, 0] if self.picks.shape[1] else np.full(len(self.picks), -1, np.int64)


@dataclass(frozen=True, eq=False)
class Extra:
    """Figures of a router that constants do not have; as in ``Row``."""

    warnings: tuple[str, ...] = ()
    calibration: Calibration | None = None
    curve: CostFigures | None = None
    stays: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


def constants(
    ground: Ground, singles: Mapping[str, Choice], *, tasks: Sequence[str] | None, draws: int
) -> list[Chosen]:
    """Chance, best singles, the cheapest, and the oracles.

    Args:
        ground: what they choose on.
        singles: name of the row -> ``(Q,)`` the best single expert on training data; the first one is what the other
            constants are compared with.
        tasks: ``(Q,)`` labels, or None.
        draws: of the random choice.
    """
    table, cost, number = ground.table, ground.cost, len(ground.queries)
    hindsight = constant(best_single_of(table), number)
    best = next(iter(singles.values()), hindsight)
    none = np.empty((number, 0), np.int64)
    drawn = random_choices(table.queries, table.experts, draws=draws, seed=ground.seed)
    rows = [Chosen(RANDOM, "constant", none, best, draws=drawn)]
    rows += [
        Chosen(name, "constant", choice[:, None], None if choice is best else best)
        for name, choice in singles.items()
    ]
    if cost is not None:
        cheapest = cheapest_choice(cost, table.experts)
        name = f"{CHEAPEST}: {table.experts[cheapest[0]]}"
        rows.append(Chosen(name, "constant", cheapest[:, None], best))
    name = f"best single in hindsight: {table.experts[hindsight[0]]}"
    rows.append(Chosen(name, "oracle", hindsight[:, None], best if singles else None))
    if tasks is not None:
        by_task = group_choice(table.score, cost, table.experts, tasks)
        rows.append(Chosen(TASK_ORACLE, "oracle", by_task[:, None], best))
    oracle = best_choice(table.score, cost, table.experts)
    rows.append(Chosen(QUERY_ORACLE, "oracle", oracle[:, None], best))
    return rows


def measured(ground: Ground, chosen: Sequence[Chosen]) -> list[Row]:
    """A row for each of the choices."""
    details = {one.name: _detail(ground, one) for one in chosen}
    expected = row_means(ground.table.score)
    columns: dict[tuple[str, str], Floats] = {}
    for one in chosen:
        actual = details[one.name].actual
        columns[one.name, "score"] = actual
        columns[one.name, "cost"] = details[one.name].cost
        columns[one.name, "random"] = actual - expected
        if one.best is not None:
            columns[one.name, "best"] = actual - of_choice(ground.table.score, one.best)
        for other in one.against:
            columns[one.name, f"against {other}"] = actual - details[other].actual
    stacked = np.stack(list(columns.values()), axis=1)
    means = bootstrap_means(stacked, ground.groups, resamples=ground.resamples, seed=ground.seed)
    resampled = {key: means[:, i] for i, key in enumerate(columns)}

    def value(key: tuple[str, str]) -> Estimate:
        return estimate(mean_of(columns[key]), resampled[key], level=ground.level)

    def difference(key: tuple[str, str]) -> Comparison:
        return compare(mean_of(columns[key]), resampled[key], level=ground.level)

    oracle = details.get(TASK_ORACLE)
    rows = []
    for one in chosen:
        detail, choice, share = details[one.name], one.first(), _shares(ground, one)
        rows.append(
            Row(
                name=one.name,
                role=one.role,
                scored=int((~np.isnan(detail.actual)).sum()),
                unknown=int(((choice >= 0) & np.isnan(detail.actual)).sum()),
                abstained=0 if one.draws is not None else int((choice < 0).sum()),
                score=value((one.name, "score")),
                over_best=None if one.best is None else difference((one.name, "best")),
                over_random=difference((one.name, "random")),
                below_task=float("nan") if oracle is None else mean_of(oracle.actual - detail.actual),
                regret=mean_of(detail.regret),
                cost=None if np.isnan(detail.cost).all() else value((one.name, "cost")),
                optimality=optimality(ground.table.score, ground.cost, choice),
                shares=dict(zip(ground.table.experts, share.tolist(), strict=True)),
                entropy=entropy(share),
                detail=detail,
                against={other: difference((one.name, f"against {other}")) for other in one.against},
                warnings=one.extra.warnings,
                calibration=one.extra.calibration,
                curve=one.extra.curve,
                stays=one.extra.stays,
                seconds=one.extra.seconds,
            )
        )
    return rows


def _shares(ground: Ground, one: Chosen) -> Floats:
    choice = one.first() if one.draws is None else one.draws.ravel()
    return shares(choice, len(ground.table.experts))


def _detail(ground: Ground, one: Chosen) -> Detail:
    """Query by query; for draws the mean of those with a known outcome."""
    score, cost = ground.table.score, ground.cost
    unknown = np.full(len(ground.queries), np.nan)
    if one.draws is not None:
        actual = column_means(np.stack([of_choice(score, choice) for choice in one.draws]))
        paid = (
            unknown
            if cost is None
            else column_means(np.stack([of_choice(cost, choice) for choice in one.draws]))
        )
    else:
        actual = of_choice(score, one.first())
        paid = unknown if cost is None else _paid(cost, one.picks)
    expected = unknown if one.expected is None else one.expected
    return Detail(one.picks, expected, actual, paid, regret(score, actual))


def _paid(cost: Floats, picks: NDArray[np.int64]) -> Floats:
    """``(Q,)`` dollars of all picks; NaN if one is not known or there are none."""
    each = np.stack([of_choice(cost, column) for column in picks.T], axis=1)
    each = np.where(picks < 0, 0.0, each)
    return np.where((picks >= 0).any(axis=1), each.sum(axis=1), np.nan)
