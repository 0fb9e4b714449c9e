"""AutoMix: a small expert verifies its own answer, and a rule fitted on few outcomes says when to ask a large one.

Q queries, B = ``bins`` + 1 bins of the verification score: the score nearest to 0, 1/bins, ..., 1.
Source: Aggarwal, Madaan et al., AutoMix (arXiv 2310.12963, NeurIPS 2024) and its released code,
github.com/automix-llm/automix, ``automix_methods.py`` and ``main.py`` (defaults, the order of the rules, the cost of a
query).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices
from mixmerge.routers.cascade import Asked, Step, checked_history

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
Method = Literal[
    "self_consistency", "threshold", "double_threshold", "triple_threshold", "belief", "greedy", "pomdp"
]
SMOOTHING = 2.0  # bins: standard deviation of the Gaussian over the gains of ``greedy``


@dataclass(frozen=True)
class AutomixCosts:
    """What asking costs, in any unit; the released code's defaults. All 0 or more, ``large`` above ``small``."""

    small: float = 1.0
    large: float = 50.0
    verifier: float = 1.0

    def __post_init__(self) -> None:
        if not (
            0 <= self.small < self.large and self.verifier >= 0 and np.isfinite(self.large + self.verifier)
        ):
            raise MixmergeError(
                Fault(
                    "automix.costs",
                    f"are {self.small:g}, {self.large:g} and {self.verifier:g}",
                    "0 or more, and the large expert costs more than the small one",
                )
            )


@dataclass(frozen=True)
class Rule:
    """For which verification scores to escalate: within one of the intervals, or in one of the bins.

    Args:
        intervals: pairs of bounds, both included.
        flags: one for each bin; empty for a rule of intervals.
    """

    intervals: tuple[tuple[float, float], ...] = ()
    flags: tuple[bool, ...] = ()

    def escalates(self, verified: Floats) -> Flags:
        """``(Q,)`` from ``(Q,)``."""
        if self.flags:
            return np.asarray(np.array(self.flags)[nearest_bin(verified, len(self.flags) - 1)])
        within = [(verified >= low) & (verified <= high) for low, high in self.intervals]
        return np.logical_or.reduce(within) if within else np.zeros(np.shape(verified), np.bool_)


@dataclass(frozen=True)
class Automix:
    """A fitted rule between two experts, and what it does on the outcomes it was fitted on.

    Args:
        experts: the small and the large one.
        rule: when to escalate.
        method: that found it: of ``pomdp`` the one whose rule was best.
        lift: how much more score a unit of cost buys than always asking the large expert does, as a share of that:
            (IBC - IBC of the large expert) / IBC of the large expert, 0 for as much.
        score, cost: mean of a query.
        share: of the queries that escalate.
    """

    experts: tuple[str, str]
    rule: Rule
    method: Method
    lift: float
    score: float
    cost: float
    share: float

    def escalate(self, verified: float) -> bool:
        """Whether to ask the large expert; NaN, no verification, does.

        Raises:
            MixmergeError: the score is not in 0..1.
        """
        if np.isnan(verified):
            return True
        return bool(self.rule.escalates(_checked_scores(np.array([verified])))[0])

    def next_step(self, history: Sequence[Asked]) -> Step:
        """As of ``cascade.Cascade``; the confidence of the small expert's answer is its verification score."""
        checked_history(self.experts, history)
        small, large = self.experts
        if not history:
            return Step("escalate", small)
        if len(history) == 1 and self.escalate(history[0].confidence):
            return Step("escalate", large)
        return Step("answer", history[-1].expert)


def nearest_bin(verified: Floats, bins: int) -> Indices:
    """``(Q,)`` in 0..bins; half way between two goes up."""
    return np.floor(verified * bins + 0.5).astype(np.int64)


def fit_automix(
    experts: tuple[str, str],
    small: Floats,
    large: Floats,
    verified: Floats,
    *,
    method: Method = "pomdp",
    bins: int = 8,
    costs: AutomixCosts | None = None,
    solved: float = 0.5,
    prior: float = 0.0,
) -> Automix:
    """The rule of the highest incremental benefit per cost (IBC) on outcomes.

    IBC of a rule: ``(score - score_small) / (cost - cost_small)``, where a query costs small + verifier, and the
    large expert's besides if it escalates. Rules tried, in this order:

    - ``self_consistency``: the score is 0.5 or less.
    - ``threshold``: it is t or less, for t = 0, 1/bins, ..., 1.
    - ``double_threshold``: it is between two of 0, 1/bins, ..., below 1: what verifies worst is hopeless.
    - ``triple_threshold``: it is up to the first of three, or between the others.
    - ``belief``: the POMDP of one step. Queries are needy (only the large expert solves them), good (the small one
      does) or hopeless; the bins whose belief ``P(needy | bin)`` is above a limit escalate, for every limit.
    - ``greedy``: bins are added from the highest mean gain, smoothed over neighbours, to the lowest.
    - ``pomdp``: the best of ``belief``, ``greedy``, ``double_threshold`` and ``threshold``, as in the released code.

    Of equal rules the first with the lowest cost. Deviations from the released code: it sweeps a reward for the belief
    up to 4,999 against a cost of 100, which gives the same sets of bins but for those less than 2 % needy; it puts
    scores into bins in three ways that differ at the edges, here the nearest bin is meant throughout; its states come
    with its data, here ``solved`` makes them from scores; ``prior`` is ours.

    Args:
        experts: names of the small and the large one.
        small, large: ``(Q,)`` scores of their answers; rows with NaN are left out, as of ``verified``.
        verified: ``(Q,)`` in 0..1, share of verifications that say the small expert is right.
        bins: 2 or more.
        costs: 1, 50 and 1 by default.
        solved: score from which on an answer counts as right, for ``belief``.
        prior: how many queries of the average mix a bin's belief starts from; 0 as released.

    Raises:
        MixmergeError: an unknown method, columns that do not fit, scores out of range, no complete row, or a large
            expert that is no better than the small one, so that nothing can be gained.
    """
    costs = costs or AutomixCosts()
    known: list[str] = [*METHODS, "pomdp"]
    if method not in known:
        raise MixmergeError(Fault("automix.method", f"there is no {method!r}", choices(method, known)))
    small, large, verified = _complete(small, large, verified, bins)
    gain = float(large.mean() - small.mean())
    if gain <= 0:
        raise MixmergeError(
            Fault(
                "automix",
                f"{experts[1]} scores {large.mean():.4g}, no more than {experts[0]} with {small.mean():.4g}",
                run="Ask the small expert only, or give them the other way round",
            )
        )
    data = Verified(small, large, verified, bins, solved, prior)
    tried: dict[tuple[float, float], tuple[Method, Rule, float, float]] = {}
    for name in UNION if method == "pomdp" else (method,):
        for rule in METHODS[name](data):
            up = rule.escalates(verified)
            score = float(np.where(up, large, small).mean())
            cost = costs.small + costs.verifier + float(up.mean()) * costs.large
            slope = 0.0 if cost <= costs.small else (score - float(small.mean())) / (cost - costs.small)
            lift = slope * (costs.large - costs.small) / gain - 1.0
            tried.setdefault((-round(lift, 12), cost), (name, rule, score, float(up.mean())))
    (loss, cost), (found, rule, score, share) = min(tried.items(), key=lambda item: item[0])
    return Automix(experts, rule, found, -loss, score, cost, share)


@dataclass(frozen=True, eq=False)
class Verified:
    """What rules are made from; arguments as of ``fit_automix``, without missing values."""

    small: Floats
    large: Floats
    verified: Floats
    bins: int
    solved: float
    prior: float


def _edges(data: Verified) -> list[float]:
    return [i / data.bins for i in range(data.bins)]


def _self_consistency(data: Verified) -> Iterator[Rule]:
    yield Rule(((0.0, 0.5),))


def _threshold(data: Verified) -> Iterator[Rule]:
    for high in (*_edges(data), 1.0):
        yield Rule(((0.0, high),))


def _double_threshold(data: Verified) -> Iterator[Rule]:
    for low, high in combinations(_edges(data), 2):
        yield Rule(((low, high),))


def _triple_threshold(data: Verified) -> Iterator[Rule]:
    for first, low, high in combinations(_edges(data), 3):
        yield Rule(((0.0, first), (low, high)))


def beliefs(
    small: Floats, large: Floats, verified: Floats, *, bins: int = 8, solved: float = 0.5, prior: float = 0.0
) -> Floats:
    """``(B, 3)`` how likely a query of each bin is needy, good or hopeless; rows of bins without queries are 0
    unless there is a ``prior``. Arguments as of ``fit_automix``."""
    good = small >= solved
    needy = ~good & (large >= solved)
    states = np.stack([needy, good, ~good & ~needy], axis=1).astype(np.float64)  # (Q, 3)
    count = np.zeros((bins + 1, 3))
    np.add.at(count, nearest_bin(verified, bins), states)
    count += prior * states.mean(axis=0)
    total = count.sum(axis=1, keepdims=True)
    return np.asarray(count / np.where(total > 0, total, 1.0))


def _belief(data: Verified) -> Iterator[Rule]:
    needy = beliefs(
        data.small, data.large, data.verified, bins=data.bins, solved=data.solved, prior=data.prior
    )[:, 0]
    yield Rule(flags=(False,) * len(needy))
    for limit in np.unique(needy)[::-1]:
        if limit > 0:
            yield Rule(flags=tuple(bool(one >= limit) for one in needy))


def _greedy(data: Verified) -> Iterator[Rule]:
    from scipy.ndimage import gaussian_filter1d

    at = nearest_bin(data.verified, data.bins)
    count = np.bincount(at, minlength=data.bins + 1)
    gained = np.bincount(at, weights=data.large - data.small, minlength=data.bins + 1)
    smooth = gaussian_filter1d(gained / np.maximum(count, 1), SMOOTHING)
    flags = np.zeros(data.bins + 1, np.bool_)
    for place in np.argsort(-smooth, kind="stable"):
        flags[place] = True
        yield Rule(flags=tuple(bool(one) for one in flags))


UNION: tuple[Method, ...] = ("belief", "greedy", "double_threshold", "threshold")
# Rules to try, from outcomes.
METHODS: dict[Method, Callable[[Verified], Iterator[Rule]]] = {
    "self_consistency": _self_consistency,
    "threshold": _threshold,
    "double_threshold": _double_threshold,
    "triple_threshold": _triple_threshold,
    "belief": _belief,
    "greedy": _greedy,
}


def _complete(small: Floats, large: Floats, verified: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    faults = []
    if not (small.ndim == 1 and small.shape == large.shape == verified.shape):
        faults.append(
            Fault(
                "automix",
                f"columns have the shapes {small.shape}, {large.shape}, {verified.shape}",
                "(Q,) each",
            )
        )
    if bins < 2:
        faults.append(Fault("automix.bins", f"are {bins}", "2 or more"))
    if faults:
        raise MixmergeError(faults)
    whole = ~np.isnan(np.stack([small, large, verified])).any(axis=0)
    if not whole.any():
        raise MixmergeError(Fault("automix", "no query has both scores and a verification"))
    return small[whole], large[whole], _checked_scores(verified[whole])


def _checked_scores(verified: Floats) -> Floats:
    if (verified < 0).any() or (verified > 1).any():
        raise MixmergeError(
            Fault(
                "automix.verified",
                f"holds {verified.min():g} to {verified.max():g}",
                "0 to 1: the share of verifications that say the answer is right",
            )
        )
    return verified
