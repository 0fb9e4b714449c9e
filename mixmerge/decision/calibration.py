"""Numbers of policies found on outcomes: thresholds, and where to abstain. Q queries, E experts.

The outcomes should be of queries that the router was not fitted on: on its own, scores look surer than they are.
The budget is in ``mixmerge.decision.budgets``.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mixmerge.decision.choosing import NOBODY, Floats, Integers
from mixmerge.decision.policies import Policy
from mixmerge.decision.records import Scores, queries_of
from mixmerge.decision.rules import choice_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable


class Calibrated(BaseModel):
    """A policy, and what it did on the outcomes it was calibrated on. JSON values.

    Args:
        policy: with the number that was found.
        goal: what was asked for, in a sentence.
        rows: outcomes it was found on.
        cost: mean dollars a query, as recorded or, where that is missing, as the router expects; None if neither is
            known. A query that nobody answers costs 0.
        cost_bound: upper confidence bound of the mean cost of further queries of the same kind.
        bound: which bound that is.
        score: mean score of what was answered, of the rows where it is known; None without outcomes.
        score_low, score_high: its two-sided interval, by the normal approximation.
        scored: rows whose score is known.
        confidence: of interval and bound.
        answered: share of the rows that somebody answers.
        shares: share of the rows whose first pick is the expert.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    policy: Policy
    goal: str
    rows: int = Field(ge=1)
    cost: float | None = None
    cost_bound: float | None = None
    bound: str = ""
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    scored: int = 0
    confidence: float = 0.95
    answered: float = 1.0
    shares: dict[str, float] = Field(default_factory=dict)


def calibrate_threshold(
    scores: Scores,
    strong: str,
    weak: str,
    *,
    share: float | None = None,
    recovered: float | None = None,
    table: OutcomeTable | None = None,
    confidence: float = 0.95,
) -> Calibrated:
    """The threshold of expected gain for which the strong expert answers a share of the queries.

    Source: Ong et al. (2024), RouteLLM, arXiv 2406.18665, section 3.2: a threshold for each share of strong calls, and
    CPT(x), the least share that recovers x of the gap; that the threshold is a quantile of the router's scores is
    of its released ``calibrate_threshold``. Deviations: gains instead of
    win probabilities, your own outcomes instead of precomputed ones, and of tied gains all or none, so the share
    is at most the wanted one.

    Args:
        scores: of the calibration queries.
        strong, weak: names of two experts.
        share: wanted of the strong expert, 0 to 1. Either this,
        recovered: or the share of the gap between the experts' mean scores that is to be won, 0 to 1, with as few
            calls of the strong one as possible.
        table: outcomes of the same queries, in the same order. Needed for ``recovered``; with it the result has
            scores and costs.
        confidence: of the interval.

    Raises:
        MixmergeError: both or none of share and recovered, unknown experts, no outcomes, a strong expert that is
            not the better one, outcomes of other queries.
    """
    faults = [
        Fault(name, f"is {value}", "From 0 to 1")
        for name, value in (("share", share), ("recovered", recovered))
        if value is not None and not 0 <= value <= 1
    ]
    if (share is None) == (recovered is None):
        faults.append(Fault("share, recovered", "both or none are given", "One of them"))
    if recovered is not None and table is None:
        faults.append(Fault("recovered", "needs outcomes", run="Pass table"))
    if faults:
        raise MixmergeError(faults)
    named = Policy(kind="threshold", threshold=0.0, strong=strong, weak=weak)
    choice_of(named, scores, None)  # raises for what it cannot decide on
    if not len(scores):
        raise MixmergeError(Fault("scores", "are of no query", "One or more"))
    first, second = scores.experts.index(strong), scores.experts.index(weak)
    gain = scores.mean[:, first] - scores.mean[:, second]
    if not np.isfinite(gain).all():
        raise MixmergeError(Fault("scores", f"of {strong} or {weak} are not all finite"))
    ordered = np.sort(gain)[::-1]
    # the first n of the highest gains, where no tie is cut
    ends = np.append(0, 1 + np.flatnonzero(np.append(ordered[1:] < ordered[:-1], True)))
    if recovered is None:
        wanted = share or 0.0
        n = int(ends[ends <= wanted * len(gain) + 1e-9][-1])
        goal = f"{strong} answers at most {wanted:.1%} of the queries"
    else:
        n = _recovering(gain, aligned(scores, table), (first, second), ends, recovered)
        goal = f"{recovered:.1%} of the gap between {weak} and {strong}"
    threshold = float(ordered[n - 1]) if n else math.nextafter(float(ordered[0]), math.inf)
    policy = Policy(kind="threshold", threshold=threshold, strong=strong, weak=weak)
    return measured(policy, scores, table, goal=goal, confidence=confidence)


def _recovering(
    gain: Floats, table: OutcomeTable | None, pair: tuple[int, int], ends: Integers, recovered: float
) -> int:
    """The fewest of the highest gains with which that share of the gap is won."""
    score = np.empty((0, 0)) if table is None else table.score
    strong, weak = score[:, pair[0]], score[:, pair[1]]
    difference = np.where(np.isnan(strong) | np.isnan(weak), 0.0, strong - weak)
    gap = difference.sum()
    if gap <= 0:
        raise MixmergeError(
            Fault("recovered", "the strong expert scores no more than the weak one on these outcomes")
        )
    won = np.append(0.0, np.cumsum(difference[np.argsort(-gain, kind="stable")]))[ends]
    return int(ends[np.flatnonzero(won >= recovered * gap - 1e-12 * gap)[0]])


def calibrate_abstain(
    scores: Scores,
    table: OutcomeTable,
    *,
    target: float,
    policy: Policy | None = None,
    confidence: float = 0.95,
) -> Calibrated:
    """The lowest ``abstain_below`` with which the mean score of what is answered reaches a target.

    The mean is that of the calibration rows; the interval beside it says how far to trust it. It is no guarantee:
    the bound was chosen on the same rows.

    Args:
        scores: of the calibration queries.
        table: their outcomes, in the same order. Rows where the pick has no score count for nothing.
        target: mean score wanted.
        policy: what picks; ``argmax`` by default. A fallback is kept, but its answers are not counted.
        confidence: of the interval.

    Raises:
        MixmergeError: no bound reaches the target; the best that can be had is said.
    """
    table = aligned(scores, table)
    base = (policy or Policy()).as_dict()
    bare = Policy(**{k: v for k, v in base.items() if k not in ("abstain_below", "fallback")})
    choice = choice_of(bare, scores, queries_of(table))
    truth = _picked(table.score, choice.picks[:, 0])
    counted = np.flatnonzero(~np.isnan(truth))
    if not counted.size:
        raise MixmergeError(Fault("outcomes", "no query has a score of the expert that is picked for it"))
    counted = counted[np.argsort(-choice.level[counted], kind="stable")]
    level = choice.level[counted]
    means = np.cumsum(truth[counted]) / np.arange(1, len(counted) + 1)
    ends = np.flatnonzero(np.append(level[1:] < level[:-1], True))  # last row of each distinct level
    reaching = ends[means[ends] >= target - 1e-12 * abs(target)]
    if not reaching.size:
        best = ends[means[ends].argmax()]
        what = f"no bound reaches a mean score of {target:g}"
        least = f"At most {means[best]:.4g}, of {(best + 1) / len(counted):.1%} of the queries"
        raise MixmergeError(Fault("target", what, least))
    found = Policy(**{**base, "abstain_below": float(level[reaching[-1]])})
    goal = f"mean score of at least {target:g} of what is answered"
    return measured(found, scores, table, goal=goal, confidence=confidence, without_fallback=True)


# --- shared


def aligned(scores: Scores, table: OutcomeTable | None) -> OutcomeTable:
    """The table with the experts of the scores, in their order.

    Raises:
        MixmergeError: there is none, it has other queries, or not all experts.
    """
    if table is None:
        raise MixmergeError(Fault("outcomes", "are missing"))
    if len(table) != len(scores) or not len(table):
        what = f"has {len(table)} rows, and there are scores of {len(scores)} queries"
        raise MixmergeError(Fault("outcomes", what, "The same queries in the same order, one or more"))
    return table if table.experts == scores.experts else table.only(scores.experts)


def known_costs(scores: Scores, table: OutcomeTable) -> Floats | None:
    """``(Q, E)`` dollars: as recorded, and where that is missing as the router expects; None if neither is known."""
    recorded = table.costs()
    if recorded is None or scores.cost is None:
        return scores.cost if recorded is None else recorded
    return np.where(np.isnan(recorded), scores.cost, recorded)


def _picked(values: Floats, picks: Integers) -> Floats:
    """``(Q,)`` of one expert each, NaN for nobody."""
    found = values[np.arange(len(values)), np.maximum(picks, 0)]
    return np.where(picks == NOBODY, np.nan, found)


def measured(
    policy: Policy,
    scores: Scores,
    table: OutcomeTable | None,
    *,
    goal: str,
    confidence: float = 0.95,
    without_fallback: bool = False,
) -> Calibrated:
    """What a policy does on these queries, and what came of it where outcomes are known."""
    if not 0 < confidence < 1:
        raise MixmergeError(Fault("confidence", f"is {confidence}", "Between 0 and 1"))
    outcomes = None if table is None else aligned(scores, table)
    queries = None if outcomes is None else queries_of(outcomes)
    choice = choice_of(policy, scores, queries)
    first, rows = choice.picks[:, 0], len(scores)
    count = np.bincount(first[first != NOBODY], minlength=len(scores.experts))
    result: dict[str, object] = {
        "rows": rows,
        "confidence": confidence,
        "answered": float((first != NOBODY).mean()),
        "shares": {name: float(n / rows) for name, n in zip(scores.experts, count, strict=True)},
    }
    if outcomes is not None:
        counted = np.where(choice.fell, NOBODY, first) if without_fallback else first
        truth = _picked(outcomes.score, counted)
        result |= _interval(truth[~np.isnan(truth)], confidence)
    costs = scores.cost if outcomes is None else known_costs(scores, outcomes)
    if costs is not None:
        spent = np.where(choice.picks == NOBODY, 0.0, _all_picked(costs, choice.picks)).sum(axis=1)
        result["cost"] = None if np.isnan(spent).any() else float(spent.mean())
    return Calibrated.model_validate({"policy": policy, "goal": goal, **result})


def _all_picked(values: Floats, picks: Integers) -> Floats:
    return np.asarray(values[np.arange(len(values))[:, None], np.maximum(picks, 0)])


def _interval(score: Floats, confidence: float) -> dict[str, object]:
    if not score.size:
        return {"scored": 0}
    mean = float(score.mean())
    error = float(score.std(ddof=1)) / math.sqrt(len(score)) if len(score) > 1 else math.inf
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    ends = {"score_low": mean - half, "score_high": mean + half} if math.isfinite(half) else {}
    return {"scored": len(score), "score": mean, **ends}
