"""Cascades: ask the cheapest expert first, and a better one while the answer is not sure enough.

Here is who is asked when; running it is up to whoever holds the experts. Q queries, E experts of a cascade in the
order of escalation, S = E - 1 stages that may escalate, G thresholds of a stage that are tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
CELLS = 2_000_000  # combinations of thresholds that are tried


@dataclass(frozen=True)
class Asked:
    """An expert that has answered, and how sure its answer is; NaN if that is not known."""

    expert: str
    confidence: float = math.nan


@dataclass(frozen=True)
class Step:
    """What to do next: ``escalate`` to this expert (ask it), or let the ``answer`` of this expert stand."""

    action: Literal["answer", "escalate"]
    expert: str


class Escalation(Protocol):
    """What a runner needs of a cascade."""

    @property
    def experts(self) -> tuple[str, ...]:
        """In the order of escalation."""

    def next_step(self, history: Sequence[Asked]) -> Step:
        """What to do after these answers."""


@dataclass(frozen=True)
class Cascade:
    """Experts in the order of escalation, with the confidence that lets an answer of each stand.

    Args:
        experts: unique names, one or more.
        thresholds: S: the answer of expert i stands if its confidence is this or more. Minus infinity never
            escalates, plus infinity always. The last expert's answer always stands, so it has none.

    Raises:
        MixmergeError: no experts, one twice, or another number of thresholds; a threshold that is NaN.
    """

    experts: tuple[str, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        faults = []
        if not self.experts or len(set(self.experts)) < len(self.experts):
            faults.append(Fault("cascade.experts", f"are {list(self.experts)}", "One or more, each once"))
        if len(self.thresholds) != max(len(self.experts) - 1, 0) or any(map(math.isnan, self.thresholds)):
            faults.append(
                Fault(
                    "cascade.thresholds",
                    f"are {list(self.thresholds)}",
                    f"A number for each of the {len(self.experts)} experts but the last",
                )
            )
        if faults:
            raise MixmergeError(faults)

    def escalate(self, confidence: float, *, stage: int = 0) -> bool:
        """Whether an answer of that confidence by expert ``stage`` is not good enough. NaN never is."""
        return stage < len(self.thresholds) and not confidence >= self.thresholds[stage]

    def next_step(self, history: Sequence[Asked]) -> Step:
        """What to do after these answers, first to last; the first step asks the first expert.

        Raises:
            MixmergeError: the answers are not those of this cascade's experts in order.
        """
        checked_history(self.experts, history)
        if not history:
            return Step("escalate", self.experts[0])
        stage = len(history) - 1
        if self.escalate(history[-1].confidence, stage=stage):
            return Step("escalate", self.experts[stage + 1])
        return Step("answer", self.experts[stage])


def checked_history(experts: Sequence[str], history: Sequence[Asked]) -> None:
    """Raise a fault if these are not answers of the first of these experts, in order."""
    names = [one.expert for one in history]
    if names != list(experts[: len(names)]):
        raise MixmergeError(
            Fault("cascade.history", f"has answers of {', '.join(names)}", f"In order: {', '.join(experts)}")
        )


@dataclass(frozen=True)
class Fitted:
    """A cascade with what it does on the outcomes it was fitted on.

    Args:
        cascade: the cascade.
        score: mean score.
        cost: mean cost of a query, all experts asked and all checks included.
        share: of the queries that end with each expert, E.
        queries: that were used: those whose scores, costs and confidences are all known.
        exact: no thresholds do better on these queries; otherwise, none of the quantiles tried.
    """

    cascade: Cascade
    score: float
    cost: float
    share: tuple[float, ...]
    queries: int
    exact: bool


def fit_cascade(
    experts: Sequence[str],
    score: Floats,
    confidence: Floats,
    cost: Floats,
    *,
    max_cost: float | None = None,
    min_score: float | None = None,
    check_cost: float = 0.0,
    cells: int = CELLS,
) -> Fitted:
    """Thresholds of the highest mean score within a cost, or of the lowest cost that reaches a score.

    Tries every combination of the thresholds that matter, half way between neighbouring confidences, if there are at
    most ``cells`` combinations, else quantiles of them. Of equal ones the cheaper (or better), then lower thresholds.

    Args:
        experts: in the order of escalation, E.
        score: ``(Q, E)``; NaN where not known.
        confidence: ``(Q, S)`` of the answer of every expert but the last, any scale, higher is surer; a further
            column is not looked at.
        cost: ``(Q, E)`` of asking each expert, or ``(E,)``; any unit.
        max_cost: highest mean cost of a query. Without both limits: the highest score, whatever it costs.
        min_score: lowest mean score.
        check_cost: of one confidence, paid for each expert asked but the last; 0 or more.
        cells: combinations that are tried, at most.

    Raises:
        MixmergeError: shapes that do not fit, no complete query, both limits, or one that no thresholds keep (with
            the best that is possible).
    """
    _check_shapes(experts, score, confidence, cost, max_cost, min_score)
    stages = len(experts) - 1
    paid = np.broadcast_to(cost, score.shape).astype(np.float64)
    if stages:
        paid = paid + check_cost * (np.arange(len(experts)) < stages)
    sure = confidence[:, :stages].astype(np.float64)
    complete = np.isfinite(np.concatenate([score, paid, sure], axis=1)).all(axis=1)
    if not complete.any():
        raise MixmergeError(Fault("cascade", "no query has all scores, costs and confidences"))
    score, total, sure = score[complete], np.cumsum(paid[complete], axis=1), sure[complete]
    tried = _candidates(sure, cells)
    mean_score, mean_cost = _surfaces(score, total, sure, [grid for grid, _ in tried])
    place = _choose(mean_score, mean_cost, max_cost, min_score)
    thresholds = tuple(float(grid[i]) for (grid, _), i in zip(tried, place, strict=True))
    return Fitted(
        Cascade(tuple(experts), thresholds),
        float(mean_score[place]),
        float(mean_cost[place]),
        _shares(sure, thresholds),
        len(score),
        all(whole for _, whole in tried),
    )


def _candidates(sure: Floats, cells: int) -> list[tuple[Floats, bool]]:
    """For each stage the thresholds tried, G, ascending; and whether they are all that matter."""
    stages = sure.shape[1]
    most = max(int(cells ** (1 / stages)), 2) if stages else 0
    found = []
    for s in range(stages):
        values = np.unique(sure[:, s])
        between = (values[1:] + values[:-1]) / 2
        # Half way between two neighbouring floats may round to the lower one, which would then stand.
        between = np.where(between > values[:-1], between, values[1:])
        whole = len(between) + 2 <= most
        if not whole:
            between = np.unique(np.quantile(between, np.linspace(0, 1, most - 2), method="nearest"))
        found.append((np.concatenate([[-np.inf], between, [np.inf]]), whole))
    return found


def _surfaces(score: Floats, total: Floats, sure: Floats, grids: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Mean score and cost for every combination of thresholds: ``(G_1, ..., G_S)`` each.

    A query passes stage s with threshold j if its confidence is below it, which is to say if the number of
    thresholds up to its confidence is at most j. So the queries that end at stage s are counted by their numbers at
    the stages up to there, and summed: up to j over the stages they passed, beyond j over the one they end at.
    """
    stages, shape = len(grids), tuple(len(grid) for grid in grids)
    reached = [np.searchsorted(grid, sure[:, s], side="right") for s, grid in enumerate(grids)]  # 1..G
    surfaces = []
    for values in (score, total):
        surface = np.zeros(shape)
        for s in range(stages + 1):
            known = min(s + 1, stages)
            bins = tuple(size + 1 for size in shape[:known])
            table = np.zeros(bins)
            if known:
                np.add.at(table, tuple(reached[:known]), values[:, s])
            else:
                table += values[:, s].sum()
            for axis in range(known):
                below = np.cumsum(table, axis=axis)
                upto = below.take(range(shape[axis]), axis=axis)
                table = upto if axis < s else below.take([-1], axis=axis) - upto
            surface += table.reshape(table.shape + (1,) * (stages - known))
        surfaces.append(np.asarray(surface / len(score)))
    return surfaces[0], surfaces[1]


def _choose(score: Floats, cost: Floats, max_cost: float | None, min_score: float | None) -> tuple[int, ...]:
    """The place of the best combination."""
    slack_score, slack_cost = 1e-9 * max(1.0, float(np.abs(score).max())), 1e-9 * float(cost.max())
    fits = np.ones(score.shape, np.bool_)
    if max_cost is not None:
        fits = cost <= max_cost + slack_cost
        fault = Fault(
            "max_cost",
            f"no cascade of these experts costs as little as {max_cost:g}",
            f"At least {cost.min():.6g}",
        )
    if min_score is not None:
        fits = score >= min_score - slack_score
        fault = Fault(
            "min_score", f"no cascade of these experts scores {min_score:g}", f"At most {score.max():.6g}"
        )
    if not fits.any():
        raise MixmergeError(fault)
    if min_score is None:
        best = fits & (score >= score[fits].max() - slack_score)
        best &= cost <= cost[best].min() + slack_cost
    else:
        best = fits & (cost <= cost[fits].min() + slack_cost)
        best &= score >= score[best].max() - slack_score
    return tuple(int(i) for i in np.unravel_index(int(np.flatnonzero(best.ravel())[0]), score.shape))


def _shares(sure: Floats, thresholds: Sequence[float]) -> tuple[float, ...]:
    left, shares = np.ones(len(sure), np.bool_), []
    for s, threshold in enumerate(thresholds):
        stands = left & (sure[:, s] >= threshold)
        shares.append(float(stands.mean()))
        left &= ~stands
    return (*shares, float(left.mean()))


def _check_shapes(
    experts: Sequence[str],
    score: Floats,
    confidence: Floats,
    cost: Floats,
    max_cost: float | None,
    min_score: float | None,
) -> None:
    e = len(experts)
    faults = []
    if score.ndim != 2 or score.shape[1] != e or not e:
        faults.append(Fault("cascade.score", f"has the shape {score.shape}", f"queries x {e} experts"))
    elif confidence.ndim != 2 or len(confidence) != len(score) or confidence.shape[1] not in (e - 1, e):
        faults.append(
            Fault(
                "cascade.confidence",
                f"has the shape {confidence.shape}",
                f"({len(score)}, {e - 1}): queries x experts but the last",
            )
        )
    elif cost.shape not in ((e,), score.shape):
        faults.append(Fault("cascade.cost", f"has the shape {cost.shape}", f"({e},) or {score.shape}"))
    if max_cost is not None and min_score is not None:
        faults.append(Fault("cascade", "max_cost and min_score are both given", "One of them, or none"))
    if faults:
        raise MixmergeError(faults)


def order_of_escalation(experts: Sequence[str], score: Floats, cost: Floats) -> tuple[str, ...]:
    """The experts worth asking, cheapest first: each expected to score more than every cheaper one.

    Args:
        score, cost: ``(E,)`` expected; experts whose cost is not known come last, by score.
    """
    price = np.where(np.isnan(cost), np.inf, cost)
    order = sorted(range(len(experts)), key=lambda e: (price[e], -score[e], experts[e]))
    kept: list[int] = []
    for e in order:
        if not kept or score[e] > score[kept[-1]]:
            kept.append(e)
    return tuple(experts[e] for e in kept)


def as_cascade(experts: Sequence[str], thresholds: float | Sequence[float]) -> Cascade:
    """The same threshold for all of them, or one each."""
    given: tuple[Any, ...] = (
        (thresholds,) * (len(experts) - 1) if isinstance(thresholds, int | float) else tuple(thresholds)
    )
    return Cascade(tuple(experts), tuple(float(one) for one in given))
