"""Which experts to keep in a pool, from a few labelled examples. K shots, E experts, n experts kept.

Source: Yang et al., "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models" (2024, arXiv
2408.15915), section 3.2 and algorithm 1: experts are chosen by how well they do on the K shots, how likely they find
the shots' rationales (right answers by guessing are not knowledge), and how little the weights of the chosen ones are
alike. Deviations: there ranks are added up, and only the best experts by the first two are compared in groups; how the
terms are put on one scale and weighed here is ours, and so is the overlap of errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
EXACT_UP_TO = 50_000  # pools that are compared, all of them
_EQUAL = 1e-12


@dataclass(frozen=True)
class Shot:
    """A labelled example: what is asked, and the reasoning that leads to the right answer."""

    question: str
    rationale: str


@dataclass(frozen=True)
class PoolWeights:
    """What counts for how much, each 0 or more; a term without data counts for nothing.

    Args:
        accuracy: mean score on the shots.
        likelihood: of the rationales.
        overlap: how far the experts of a pool make the same errors; counts against it.
        similarity: mean given similarity of a pool's experts, of their weights for one; counts against it.
    """

    accuracy: float = 1.0
    likelihood: float = 1.0
    overlap: float = 0.5
    similarity: float = 0.5

    def __post_init__(self) -> None:
        faults = [
            Fault(f"weights.{name}", f"is {value}", "A finite number, 0 or more")
            for name, value in vars(self).items()
            if not (math.isfinite(value) and value >= 0)
        ]
        if faults:
            raise MixmergeError(faults)


@dataclass(frozen=True)
class Standing:
    """Why an expert is kept or not.

    Args:
        expert: its name.
        kept: whether it is.
        accuracy: mean score on the shots it has a score on.
        shots: how many those are.
        likelihood: geometric mean probability of a rationale's token, 1 / perplexity; None if not given.
        overlap: mean error overlap with the kept experts but itself; None if there is no other.
        similarity: the same of the given similarity; None if not given either.
    """

    expert: str
    kept: bool
    accuracy: float
    shots: int
    likelihood: float | None
    overlap: float | None
    similarity: float | None


@dataclass(frozen=True)
class Pool:
    """The chosen experts.

    Args:
        kept: names, n, in the order in which a greedy choice would add them.
        value: of the pool, by the formula of ``select_pool``.
        greedy: the value that greedy choice alone reaches.
        exact: every pool of this size was compared; otherwise no exchange of one expert for another is better.
        standings: of all experts, E, in the table's order.
    """

    kept: tuple[str, ...]
    value: float
    greedy: float
    exact: bool
    standings: tuple[Standing, ...]


def select_pool(
    table: OutcomeTable,
    size: int,
    *,
    likelihood: Floats | None = None,
    similarity: Floats | None = None,
    weights: PoolWeights | None = None,
    best_score: float = 1.0,
    exact_up_to: int = EXACT_UP_TO,
) -> Pool:
    """The pool S of highest value.

    ``value(S) = accuracy * mean_S(acc) + likelihood * mean_S(lik) - overlap * mean_pairs(J) - similarity *
    mean_pairs(sim)``, with ``acc`` the mean score, ``lik`` the exponential of the mean log-probability of a rationale's
    token, and ``J`` the Jaccard overlap of errors, ``sum_k min(err) / sum_k max(err)`` with ``err = best_score -
    score`` over the shots that both have a score on (0 without errors). A pool of one expert has no pairs: those terms
    are 0. Grown greedily, then compared with every other pool if there are at most ``exact_up_to``, else improved
    by exchanges. Ties go to the names that come first.

    Args:
        table: outcomes on the K shots.
        size: n, 1..E.
        likelihood: ``(K, E)`` mean log-probability of a token of the shot's rationale, 0 or less; NaN where not known.
        similarity: ``(E, E)`` symmetric, finite, higher is more alike; its diagonal is not looked at.
        weights: of the terms.
        best_score: the highest score there is.

    Raises:
        MixmergeError: a size that does not fit, shapes that do not, an expert without a shot, two without one in
            common, scores above ``best_score``: all at once.
    """
    weights = weights or PoolWeights()
    _check(table, size, likelihood, similarity, best_score)
    order = sorted(range(len(table.experts)), key=lambda e: table.experts[e])  # first names first, on ties
    known = ~np.isnan(table.score)
    accuracy = np.where(known, table.score, 0.0).sum(axis=0) / known.sum(axis=0)
    lik = None if likelihood is None else np.exp(np.nanmean(likelihood, axis=0))
    overlap = error_overlap(table.score, best_score=best_score)
    single = weights.accuracy * accuracy + (0.0 if lik is None else weights.likelihood * lik)
    pair = weights.overlap * overlap
    if similarity is not None:
        pair = pair + weights.similarity * similarity
    single, pair = single[order], pair[np.ix_(order, order)]
    greedy = _grown(single, pair, range(len(single)), size=size)
    exact = math.comb(len(order), size) <= exact_up_to
    chosen = _every(single, pair, size) if exact else _exchanged(single, pair, greedy)
    if _value(single, pair, chosen) <= _value(single, pair, greedy) + _EQUAL:
        chosen = greedy
    kept = [order[i] for i in _grown(single, pair, chosen)]
    return Pool(
        tuple(table.experts[e] for e in kept),
        _value(single, pair, chosen),
        _value(single, pair, greedy),
        exact,
        tuple(
            Standing(
                name,
                e in kept,
                float(accuracy[e]),
                int(known[:, e].sum()),
                None if lik is None else float(lik[e]),
                _mean_with(overlap, e, kept),
                _mean_with(similarity, e, kept),
            )
            for e, name in enumerate(table.experts)
        ),
    )


def error_overlap(score: Floats, *, best_score: float = 1.0) -> Floats:
    """``(E, E)`` how far two experts make the same errors, in 0..1; NaN for two without a shot in common.

    Args:
        score: ``(K, E)``, at most ``best_score``; NaN where not known.
    """
    error = best_score - score
    both = ~np.isnan(error[:, :, None]) & ~np.isnan(error[:, None, :])  # (K, E, E)
    with np.errstate(invalid="ignore"):
        low = np.where(both, np.minimum(error[:, :, None], error[:, None, :]), 0.0).sum(axis=0)
        high = np.where(both, np.maximum(error[:, :, None], error[:, None, :]), 0.0).sum(axis=0)
    return np.where(both.any(axis=0), low / np.where(high > 0, high, 1.0), np.nan)


def rationale_likelihood(
    shots: Sequence[Shot], experts: Sequence[str], loglikelihood: Mapping[str, Callable[[str, str], float]]
) -> Floats:
    """``(K, E)`` for ``select_pool``: what each expert's own model says of each rationale.

    Args:
        shots: K.
        experts: in the order of the table.
        loglikelihood: of each expert, from a question and its rationale to the mean log-probability of the
            rationale's tokens, 0 or less.

    Raises:
        MixmergeError: an expert without a callable, or a value that is no log-probability.
    """
    missing = [name for name in experts if name not in loglikelihood]
    if missing:
        raise MixmergeError(Fault("loglikelihood", f"none is given for {', '.join(missing)}"))
    # Expert by expert: a model that has to be loaded is loaded once.
    columns = [[float(loglikelihood[name](s.question, s.rationale)) for s in shots] for name in experts]
    return np.array(columns, np.float64).reshape(len(experts), len(shots)).T


def _value(single: Floats, pair: Floats, chosen: Sequence[int]) -> float:
    at = list(chosen)
    pairs = len(at) * (len(at) - 1) / 2
    shared = float(np.triu(pair[np.ix_(at, at)], 1).sum()) / pairs if pairs else 0.0
    return float(single[at].mean()) - shared


def _grown(single: Floats, pair: Floats, among: Sequence[int], *, size: int | None = None) -> list[int]:
    """Of these experts, each time the one that makes the best pool with those before it; ties by place."""
    chosen: list[int] = []
    while len(chosen) < (len(among) if size is None else size):
        left = [e for e in among if e not in chosen]
        values = np.array([_value(single, pair, [*chosen, e]) for e in left])
        chosen.append(left[int(np.flatnonzero(values >= values.max() - _EQUAL)[0])])
    return chosen


def _every(single: Floats, pair: Floats, size: int) -> list[int]:
    """The best of all pools; ties go to the first by the places of its experts."""
    pools = np.array(list(combinations(range(len(single)), size)), np.int64)  # (P, n)
    values = single[pools].mean(axis=1)
    for i, j in combinations(range(size), 2):
        values -= pair[pools[:, i], pools[:, j]] / (size * (size - 1) / 2)
    return [int(e) for e in pools[np.flatnonzero(values >= values.max() - _EQUAL)[0]]]


def _exchanged(single: Floats, pair: Floats, chosen: Sequence[int]) -> list[int]:
    """Exchange one expert for another for as long as that is better."""
    best, value = list(chosen), _value(single, pair, chosen)
    better = True
    while better:
        better = False
        for i in range(len(best)):
            for e in range(len(single)):
                other = [*best[:i], e, *best[i + 1 :]]
                if e not in best and _value(single, pair, other) > value + _EQUAL:
                    best, value, better = other, _value(single, pair, other), True
    return best


def _mean_with(matrix: Floats | None, e: int, kept: Sequence[int]) -> float | None:
    others = [one for one in kept if one != e]
    return None if matrix is None or not others else float(matrix[e, others].mean())


def _check(
    table: OutcomeTable, size: int, likelihood: Floats | None, similarity: Floats | None, best_score: float
) -> None:
    known, e = ~np.isnan(table.score), len(table.experts)
    faults = []
    if not 1 <= size <= e:
        faults.append(Fault("size", f"is {size}", f"1 to {e}, the number of experts"))
    silent = [name for i, name in enumerate(table.experts) if not known[:, i].any()]
    if silent or not len(table):
        faults.append(Fault("outcomes", f"no shot has a score of {', '.join(silent or table.experts)}"))
    together = known.T.astype(np.float64) @ known
    apart = [
        f"{table.experts[i]} and {table.experts[j]}"
        for i, j in combinations(range(e), 2)
        if not together[i, j] and table.experts[i] not in silent and table.experts[j] not in silent
    ]
    if apart:
        faults.append(Fault("outcomes", f"no shot has scores of both {', of both '.join(apart)}"))
    if (table.score > best_score).any():
        faults.append(
            Fault(
                "best_score", f"is {best_score:g}", f"At least the highest score, {np.nanmax(table.score):g}"
            )
        )
    if likelihood is not None and (
        likelihood.shape != table.score.shape
        or (likelihood > 0).any()
        or np.isnan(likelihood).all(axis=0).any()
    ):
        faults.append(
            Fault(
                "likelihood",
                f"of shape {likelihood.shape} has values above 0, no value for an expert, or another shape",
                f"{table.score.shape}: mean log-probabilities of shots x experts",
            )
        )
    if similarity is not None and (
        similarity.shape != (e, e)
        or not np.isfinite(similarity).all()
        or not np.allclose(similarity, similarity.T)
    ):
        faults.append(
            Fault("similarity", f"of shape {similarity.shape} does not fit", f"({e}, {e}), symmetric")
        )
    if faults:
        raise MixmergeError(faults)
