"""What an evaluation of routers finds. Q queries, E experts, K picks, P points of a curve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.evaluate.calibration import Calibration, Reliability
from mixmerge.evaluate.choices import Optimality
from mixmerge.evaluate.costs import Hull
from mixmerge.evaluate.curves import ShareCurve
from mixmerge.evaluate.files import Written, row_of
from mixmerge.evaluate.intervals import Comparison, Estimate

if TYPE_CHECKING:
    from rich.table import Table

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Detail:
    """What a row did, query by query.

    Args:
        picks: ``(Q, K)`` experts that would answer, best first, -1 for none; K is 0 for rows without one choice.
        expected: ``(Q,)`` score that the router expected of the first; NaN for constants.
        actual: ``(Q,)`` its known score.
        cost: ``(Q,)`` known dollars of all picks.
        regret: ``(Q,)`` best known score minus ``actual``.
    """

    picks: NDArray[np.int64]
    expected: Floats
    actual: Floats
    cost: Floats
    regret: Floats


@dataclass(frozen=True, eq=False)
class CostFigures:
    """A router over all its trade-offs between score and cost, on the queries whose costs are known.

    Args:
        cost, score: ``(P,)`` of every setting.
        hull: the best of them.
        aiq: average improvement in quality over the costs common to all routers of the report.
        over_zero: AIQ minus that of the zero router: the hull of the single experts. The range of costs is held.
        saved: part of the best single expert's cost that the hull saves at its score; negative if it needs more,
            None if it never gets there.
        gained: score of the hull at the best single expert's cost, minus that expert's score; NaN if the hull starts
            above that cost.
    """

    cost: Floats
    score: Floats
    hull: Hull
    aiq: Estimate
    over_zero: Comparison
    saved: float | None
    gained: float


@dataclass(frozen=True)
class Row:
    """A router, constant or oracle in the table.

    Args:
        name: unique in the report.
        role: ``router``, ``constant`` or ``oracle``.
        scored: queries that count: with a choice whose score is known.
        unknown: with a choice whose score is not known; left out.
        abstained: without a choice; left out.
        score: mean score.
        over_best: minus the best single expert of the training data; None for that row itself.
        over_random: minus a random choice's expected score.
        below_task: score of the task oracle minus this one, where both are known; NaN without tasks.
        regret: the same of the query oracle: mean of the best known score minus this one.
        cost: mean dollars of all picks; None if no cost is known.
        optimality: beside the cheapest best expert of each query.
        shares: expert -> part of the choices.
        entropy: of the shares, 0 (constant) to 1 (all equally often).
        against: further rows -> paired difference of mean scores.
        warnings: signs that it does not route, or was fitted on these queries.
        calibration: of a router's expected scores.
        curve: of a router, where costs are known and expected.
        stays: perturbation -> part of the queries whose choice it leaves.
        seconds: taken to score and choose, if measured here.
        detail: query by query.
    """

    name: str
    role: str
    scored: int
    unknown: int
    abstained: int
    score: Estimate
    over_best: Comparison | None
    over_random: Comparison
    below_task: float
    regret: float
    cost: Estimate | None
    optimality: Optimality
    shares: Mapping[str, float]
    entropy: float
    detail: Detail
    against: Mapping[str, Comparison] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    calibration: Calibration | None = None
    curve: CostFigures | None = None
    stays: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def below_query(self) -> float:
        """The gap to the query oracle: another name of ``regret``."""
        return self.regret


@dataclass(frozen=True)
class PairFigures:
    """Of a router between two experts; see ``curves``.

    Args:
        apgr: average performance gap recovered, as RouteLLM computes it.
        exact: the same with every threshold.
        calls: 0.2, 0.5, 0.8 -> smallest share of calls to the strong expert that recovers so much; CPT.
        over_length: APGR minus that of the prompt's length, which is fitted on nothing; None for itself and chance.
        curve: the points; None for chance, which is a mean of draws.
    """

    apgr: Estimate
    exact: float
    calls: Mapping[float, float]
    over_length: Comparison | None
    curve: ShareCurve | None


@dataclass(frozen=True)
class PairReport:
    """All routers between the ``weak`` and the ``strong`` of two experts, on the queries where both are scored."""

    weak: str
    strong: str
    queries: int
    rows: Mapping[str, PairFigures]


@dataclass(frozen=True, eq=False)
class RoutingReport(Written):
    """Routers and what they stand beside, on one table of outcomes.

    Args:
        ids: of the queries that were evaluated on, Q.
        experts: E.
        policy: that turned scores into choices.
        rows: routers in the order given, then constants, then oracles.
        best: ``(Q, E)`` flags: the experts with the best known score.
        singles: expert -> mean dollars and score, where both are known.
        zero: hull of ``singles``: the zero router.
        cost_range: of all AIQ in the report.
        estimated: experts whose costs are estimates; the notes say how.
        pair: if there are two experts.
        notes: what was left out or chosen, and why; for every reader.
        warnings: of the report as a whole; rows have their own.
        seed, resamples, level: of the intervals.
    """

    ids: tuple[str, ...]
    experts: tuple[str, ...]
    policy: str
    rows: tuple[Row, ...]
    best: NDArray[np.bool_]
    singles: Mapping[str, tuple[float, float]]
    zero: Hull | None
    cost_range: tuple[float, float] | None
    estimated: tuple[str, ...]
    pair: PairReport | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seed: int
    resamples: int
    level: float

    def all_warnings(self) -> list[str]:
        """Those of the report, and those of its rows with the rows' names."""
        return [*self.warnings, *(f"{row.name}: {one}" for row in self.rows for one in row.warnings)]

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            MixmergeError: there is none.
        """
        return row_of(self.rows, name)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the single queries; null stands for what is not known."""
        left_out = {"ids", "best", "rows"}
        rest = {key: plain(value) for key, value in vars(self).items() if key not in left_out}
        return {"queries": len(self.ids), "rows": [plain(row) for row in self.rows], **rest}

    def render(self, title: str = "Routers") -> Table:
        """For people: the main figures as a table for the terminal."""
        from mixmerge.evaluate.tables import render

        return render(self, title)

    def records(self) -> Iterator[dict[str, Any]]:
        """One for every query and router, as JSON values."""
        for row in self.rows:
            if row.role == "router":
                yield from self._records(row)

    def _records(self, row: Row) -> Iterator[dict[str, Any]]:
        for i, name in enumerate(self.ids):
            yield {
                "query": name,
                "router": row.name,
                "choice": [self.experts[e] for e in row.detail.picks[i] if e >= 0],
                "expected": plain(row.detail.expected[i]),
                "actual": plain(row.detail.actual[i]),
                "cost": plain(row.detail.cost[i]),
                "best": [expert for e, expert in enumerate(self.experts) if self.best[i, e]],
                "regret": plain(row.detail.regret[i]),
            }

    def page(self, *, title: str | None = None) -> str:
        """The report with its plots as HTML that needs no other file.

        Raises:
            DependencyError: matplotlib is not installed.
        """
        from mixmerge.evaluate.report import to_html

        return to_html(self, title=title or "Routers")


def plain(value: Any) -> Any:
    """JSON values of a record: null for what is not finite; what lists single queries is left out."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray | tuple | list):
        return [plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Reliability):
        return {"error": plain(value.error()), **{key: plain(one) for key, one in vars(value).items()}}
    if hasattr(value, "__dataclass_fields__"):
        return {key: plain(one) for key, one in vars(value).items() if not isinstance(one, Detail)}
    return value
