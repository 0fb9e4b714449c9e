"""How each kind of policy chooses. Q queries, E experts, K picks a query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.choosing import NOBODY, Floats, Integers, at, best, blocks, known, sorted_draws
from mixmerge.decision.draws import draw, likelihoods, trim, uniforms
from mixmerge.decision.records import Query, Scores
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.decision.policies import Policy

_NEED_COSTS = ("budget", "willingness_to_pay")
_CALIBRATE = "Find it on outcomes of your own: mixmerge route calibrate --budget, or calibrate_budget"


@dataclass(frozen=True, eq=False)
class Choice:
    """What a policy chose.

    Args:
        picks: ``(Q, K)`` experts, ``-1`` where nobody is picked.
        first: ``(Q,)`` the expert that the rule puts first, whether or not it abstains; ``-1`` if there is none.
        level: ``(Q,)`` what ``abstain_below`` is compared with; minus infinity if there is nothing.
        fell: ``(Q,)`` the rule abstained: nobody or the fallback answers.
    """

    picks: Integers
    first: Integers
    level: Floats
    fell: NDArray[np.bool_]


def choice_of(policy: Policy, scores: Scores, queries: Sequence[Query] | None) -> Choice:
    """What the policy chooses; ``Policy.choose`` is the picks of it."""
    _check(policy, scores, queries)
    order = name_order(scores)
    picks, first, level = _by_rule(policy, scores, queries, order)
    fell = level < (-np.inf if policy.abstain_below is None else policy.abstain_below)
    fell |= first == NOBODY
    if policy.kind == "sample" and queries is not None:
        picks = _drawn(policy, scores, queries, order, ~fell)
    picks[fell] = NOBODY
    if policy.fallback is not None:
        picks[fell, 0] = scores.experts.index(policy.fallback)
    return Choice(picks, first, level, fell)


def name_order(scores: Scores) -> Integers:
    """``(E,)`` the experts sorted by name: what is done in this order does not depend on theirs."""
    return np.array(sorted(range(len(scores.experts)), key=lambda e: scores.experts[e]), np.int64)


def trades(policy: Policy, queries: Sequence[Query] | None) -> Floats | float:
    """Dollars for a point of score: one number, or ``(Q,)`` where a share of the queries has another."""
    trade = (policy.willingness_to_pay if policy.kind == "willingness_to_pay" else policy.trade) or 0.0
    if policy.above is None or not policy.share or queries is None:
        return trade
    uniform = uniforms([query.id for query in queries], 1, seed=policy.seed, purpose="budget")[:, 0]
    return np.where(uniform < policy.share, policy.above, trade)


def preference(policy: Policy, scores: Scores, rows: slice, trade: Floats | float) -> Floats:
    """``(Q, E)`` what the rule compares for these queries; minus infinity for experts without a finite score."""
    mean = known(scores.mean[rows])
    if policy.kind == "lower_bound":
        return known(mean - (policy.z or 0.0) * scores.std[rows])
    if policy.kind in _NEED_COSTS and scores.cost is not None:
        dollars = trade if isinstance(trade, float) else trade[rows, None]
        with np.errstate(invalid="ignore"):  # 0 dollars for a score of minus infinity: nobody, below
            return np.where(np.isfinite(mean), dollars * mean - scores.cost[rows], -np.inf)
    return mean


def _by_rule(
    policy: Policy, scores: Scores, queries: Sequence[Query] | None, order: Integers
) -> tuple[Integers, Integers, Floats]:
    """Picks, first and level of ``Choice``, before anybody abstains; of ``sample``, not yet drawn."""
    rows, experts = scores.mean.shape
    width = policy.k or policy.draws or 1
    picks = np.full((rows, width), NOBODY, np.int64)
    level = np.empty(rows)
    trade = trades(policy, queries)
    for part in blocks(rows, experts):
        cost = None if scores.cost is None else scores.cost[part]
        value = preference(policy, scores, part, trade)
        if policy.kind == "threshold":
            found = _of_two(policy, scores, value)[:, None]
        else:
            found = best(value, cost, order, k=policy.k or 1)
        picks[part, : found.shape[1]] = found
        bound = value if policy.kind == "lower_bound" else known(scores.mean[part])
        level[part] = at(bound, found[:, 0])
    return picks, picks[:, 0].copy(), level


def _of_two(policy: Policy, scores: Scores, mean: Floats) -> Integers:
    strong, weak = (scores.experts.index(name) for name in (policy.strong or "", policy.weak or ""))
    first, second = mean[:, strong], mean[:, weak]
    able = np.isfinite(first), np.isfinite(second)
    gain = np.where(able[0] & able[1], first, 0.0) - np.where(able[0] & able[1], second, 0.0)
    picks = np.where(gain >= (policy.threshold or 0.0), strong, weak)
    picks = np.where(able[0] & able[1], picks, np.where(able[0], strong, weak))
    return np.where(able[0] | able[1], picks, NOBODY)


def _drawn(
    policy: Policy, scores: Scores, queries: Sequence[Query], order: Integers, asked: NDArray[np.bool_]
) -> Integers:
    """``(Q, draws)`` of the queries that are asked; those of the others mean nothing."""
    draws, (rows, experts) = policy.draws or 1, scores.mean.shape
    ids = [query.id for query in queries]
    places = np.zeros((rows, draws), np.int64)  # in the order of names, so that theirs does not matter
    for part in blocks(rows, experts):
        chosen = np.flatnonzero(asked[part]) + part.start
        chance = likelihoods(known(scores.mean[chosen])[:, order], policy.temperature or 1.0)
        uniform = uniforms([ids[q] for q in chosen], draws, seed=policy.seed, purpose="sample")
        places[chosen] = draw(chance, uniform)
    if policy.trim:
        counted = np.flatnonzero(asked)
        places[counted] = trim(
            places[counted],
            able=np.isfinite(scores.mean)[:, order][counted],
            share=policy.trim,
            ids=[ids[q] for q in counted],
            tasks=[queries[int(q)].metadata.get("task", "") for q in counted],
            seed=policy.seed,
        )
    rank = np.empty(experts, np.int64)
    rank[order] = np.arange(experts)
    return sorted_draws(order[places], scores.mean, scores.cost, rank)


def _check(policy: Policy, scores: Scores, queries: Sequence[Query] | None) -> None:
    experts, kind = scores.experts, policy.kind
    faults = [
        Fault(f"policy.{name}", f"no expert is called {expert!r}", choices(expert, list(experts)))
        for name, expert in policy.experts().items()
        if expert not in experts
    ]
    if policy.k is not None and policy.k > len(experts):
        faults.append(Fault("policy.k", f"there are only {len(experts)} experts", f"At most {len(experts)}"))
    if kind in _NEED_COSTS:
        faults += _unpriced(policy, scores)
    if kind == "budget" and policy.trade is None:
        faults.append(Fault("policy.trade", "a budget needs the trade that keeps it", run=_CALIBRATE))
    if queries is None and (kind == "sample" or policy.share):
        faults.append(Fault("queries", f"{kind} draws by the queries' ids", run="Pass the queries too"))
    if queries is not None and len(queries) != len(scores):
        faults.append(Fault("queries", f"there are {len(queries)}, and scores of {len(scores)}"))
    if faults:
        raise MixmergeError(faults)


def _unpriced(policy: Policy, scores: Scores) -> list[Fault]:
    run = "Give outcomes with costs, or tokens and a price list: mixmerge route fit --prices"
    if scores.cost is None:
        return [Fault("policy", f"{policy.kind} needs costs, and the router knows none", run=run)]
    without = [name for e, name in enumerate(scores.experts) if not np.isfinite(scores.cost[:, e]).all()]
    what = f"{policy.kind} needs costs, and the router knows none of {', '.join(without)}"
    return [Fault("policy", what, run=run)] if without else []
