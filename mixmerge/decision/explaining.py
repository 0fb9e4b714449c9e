"""Decisions as records that say why. Q queries, E experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixmerge.decision.choosing import NOBODY, Floats, at, blocks, next_best
from mixmerge.decision.records import Decision, Pick, Query, Scores
from mixmerge.decision.rules import Choice, choice_of, preference, trades
from mixmerge.errors import Fault, MixmergeError

if TYPE_CHECKING:
    from mixmerge.decision.policies import Policy


def decisions(
    policy: Policy,
    scores: Scores,
    queries: Sequence[Query],
    *,
    version: str,
    reasons: Sequence[Mapping[str, Any]] | None,
) -> list[Decision]:
    """``Policy.decide``."""
    if reasons is not None and len(reasons) != len(queries):
        raise MixmergeError(Fault("reasons", f"there are {len(reasons)} of {len(queries)} queries"))
    choice = choice_of(policy, scores, queries)
    trade = trades(policy, queries)
    margin, cost = _margins(policy, scores, choice, trade), _costs(scores, choice)
    described, made = policy.describe(), []
    for q, query in enumerate(queries):
        picks, row = _picks(scores.experts, choice.picks[q].tolist()), scores.mean[q].tolist()
        primary = int(choice.picks[q, 0])
        about = primary if primary != NOBODY else int(choice.first[q])
        reason = {
            "rule": _rule(
                policy,
                choice,
                q,
                margin=float(margin[q]),
                trade=trade if isinstance(trade, float) else float(trade[q]),
            ),
            "score": None if about == NOBODY else _finite(row[about]),
            "std": None if about == NOBODY else _finite(float(scores.std[q, about])),
            "cost": _finite(float(cost[q])),
            "margin": _finite(float(margin[q])),
        }
        expected = {
            name: value for name, value in zip(scores.experts, row, strict=True) if math.isfinite(value)
        }
        more = {} if reasons is None else {k: v for k, v in reasons[q].items() if k not in reason}
        made.append(
            Decision(
                query.id,
                picks,
                picks[0].expert if picks else None,
                expected,
                described,
                {**reason, **more},
                version,
            )
        )
    return made


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _picks(experts: tuple[str, ...], row: list[int]) -> tuple[Pick, ...]:
    drawn: dict[int, int] = {}
    picks = []
    for e in row:
        if e != NOBODY:
            picks.append(Pick(experts[e], drawn.get(e, 0)))
            drawn[e] = drawn.get(e, 0) + 1
    return tuple(picks)


def _costs(scores: Scores, choice: Choice) -> Floats:
    """``(Q,)`` dollars of all picks: 0 if there are none, NaN if one's is not known."""
    nobody = choice.picks == NOBODY
    if scores.cost is None:
        return np.where(nobody.all(axis=1), 0.0, np.nan)
    dollars = scores.cost[np.arange(len(scores))[:, None], np.maximum(choice.picks, 0)]
    return np.asarray(np.where(nobody, 0.0, dollars).sum(axis=1))


def _margins(policy: Policy, scores: Scores, choice: Choice, trade: Floats | float) -> Floats:
    """``(Q,)`` in the rule's unit; NaN where there is nothing to compare."""
    margin = np.full(len(scores), np.nan)
    for part in blocks(*scores.mean.shape):
        value, picked = preference(policy, scores, part, trade), choice.picks[part, 0]
        if policy.kind == "threshold":
            strong, weak = (scores.experts.index(name) for name in (policy.strong or "", policy.weak or ""))
            with np.errstate(invalid="ignore"):  # neither is known
                margin[part] = value[:, strong] - value[:, weak]
        else:
            margin[part] = at(value, picked) - next_best(value, picked)
    if policy.abstain_below is not None:
        margin[choice.fell] = (choice.level - policy.abstain_below)[choice.fell]
    else:
        margin[choice.fell] = np.nan
    return margin


def _rule(policy: Policy, choice: Choice, q: int, *, margin: float, trade: float) -> str:
    """What decided, in a sentence."""
    if choice.fell[q]:
        then = "nobody answers" if policy.fallback is None else f"the fallback {policy.fallback} answers"
        if choice.first[q] == NOBODY:
            return f"no expert has a score: {then}"
        what = "lower bound" if policy.kind == "lower_bound" else "expected score"
        return f"the best {what} {choice.level[q]:.4g} is below {policy.abstain_below:.4g}: {then}"
    if policy.kind == "threshold":
        if not math.isfinite(margin):
            return f"only one of {policy.strong} and {policy.weak} has a score"
        side = "at least" if margin >= (policy.threshold or 0.0) else "below"
        gain = f"{policy.strong} is expected to gain {margin:.4g} over {policy.weak}"
        return f"{gain}: {side} {policy.threshold:.4g}"
    paid = f"highest {trade:.4g} * score - cost"
    return {
        "argmax": "highest expected score",
        "top_k": f"the {policy.k} highest expected scores",
        "sample": f"{policy.draws} draws by expected score, temperature {policy.temperature}",
        "budget": f"{paid}, for a mean of at most ${policy.budget} a query",
        "willingness_to_pay": paid,
        "lower_bound": f"highest expected score - {policy.z} * std",
    }[policy.kind]
