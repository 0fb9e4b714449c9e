"""Which composition to use where none is named: by how much experts' errors overlap on known outcomes.

Q queries, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """How far two experts err on the same queries.

    Args:
        experts: the two.
        queries: on which both scores are known.
        fewer: wrong answers of the one that has fewer of them.
        both: queries that both got wrong.
        share: ``both / fewer``: 0 never together, 1 whenever the better one errs; 1 if that one never errs. Errors
            that have nothing to do with each other give the error rate of the other.
        upper: the share's upper confidence bound (Wilson).
    """

    experts: tuple[str, str]
    queries: int
    fewer: int
    both: int
    share: float
    upper: float


@dataclass(frozen=True)
class Chosen:
    """A composition, and what it was chosen by.

    Args:
        kind: ``self_consistency``, ``vote`` or ``aggregate``.
        experts: that are worth asking for each query, best first.
        options: of the composition.
        reason: a sentence.
        accuracy: expert -> share of its known queries that it got right.
        pairs: of the experts that are nearly as good as the best, by name.
        majority: share of the queries known of all the ``experts`` that more than half of them got right: what a vote
            gets at least; NaN for one expert.
        single: share of the same queries that the first of them got right.
    """

    kind: Literal["self_consistency", "vote", "aggregate"]
    experts: tuple[str, ...]
    options: Mapping[str, Any]
    reason: str
    accuracy: Mapping[str, float]
    pairs: tuple[Overlap, ...]
    majority: float = math.nan
    single: float = math.nan


def choose_composition(
    table: OutcomeTable,
    *,
    solved: float = 0.5,
    near: float = 0.05,
    overlap: float = 0.5,
    z: float = 1.645,
    aggregator: str | None = None,
) -> Chosen:
    """Self-consistency of the best expert, unless others are as good and err elsewhere.

    1. The best expert is right most often. An expert is near if, on the queries that both answered, it is right at
       most ``near`` less often.
    2. Two near experts, of which one may be the best, are complementary if the upper bound of their ``Overlap`` is at
       most ``overlap``. Without such a pair: ``self_consistency``.
    3. The pair of the lowest bound, and by accuracy every near expert that is complementary to all so far, are asked.
    4. Three or more of which a majority is right more often than the best of them alone: ``vote``. Otherwise
       ``aggregate``, by the ``aggregator``; where none is told by the best of the experts.

    Source: that quality matters more than diversity, and mixing pays only among experts that are near-equal and
    complementary, is the finding of Self-MoA (arXiv 2502.00674); the rule and its parameters are ours.

    Args:
        table: outcomes, NaN where not known.
        solved: score from which on an answer counts as right.
        near: of accuracy, 0 to 1.
        overlap: highest bound of complementary experts, 0 to 1.
        z: standard deviations of the bound, 0 or more; 1.645 is exceeded by chance one time in twenty.
        aggregator: who is best at it by ``mixmerge.aggregate.bench``, if that was measured.

    Raises:
        MixmergeError: a parameter out of range, or no known score.
    """
    _check(table, near=near, overlap=overlap, z=z)
    known = ~np.isnan(table.score)
    right = known & (np.where(known, table.score, -np.inf) >= solved)
    names = [name for e, name in enumerate(table.experts) if known[:, e].any()]
    at = {name: table.experts.index(name) for name in names}
    accuracy = {name: float(right[:, e].sum() / known[:, e].sum()) for name, e in at.items()}
    order = sorted(names, key=lambda name: (-accuracy[name], name))
    close = [name for name in order if _behind(known, right, at[order[0]], at[name]) <= near]
    pairs = {frozenset(pair): _overlap(pair, known, right, at, z) for pair in combinations(sorted(close), 2)}
    found = [one for one in pairs.values() if one.upper <= overlap]
    told = tuple(pairs.values())
    if not found:
        why = f"of {len(close)} experts within {near:g} of the best no two err apart enough"
        why = (
            f"{why}: no upper bound of an overlap is at most {overlap:g}"
            if told
            else f"{order[0]} is alone in front"
        )
        return Chosen("self_consistency", (order[0],), {}, why, accuracy, told)
    start = min(found, key=lambda one: (one.upper, one.experts))
    group = set(start.experts)
    for name in close:
        if name not in group and all(pairs[frozenset((name, one))].upper <= overlap for one in group):
            group.add(name)
    asked = tuple(name for name in order if name in group)
    columns = [at[name] for name in asked]
    shared = known[:, columns].all(axis=1)
    votes = right[shared][:, columns]
    majority = float((2 * votes.sum(axis=1) > len(asked)).mean()) if len(votes) else math.nan
    single = float(votes[:, 0].mean()) if len(votes) else math.nan
    why = (
        f"{', '.join(asked)} err apart: {start.experts[0]} and {start.experts[1]} share {start.both} of {start.fewer} "
        f"errors; a majority is right on {majority:.1%}, {asked[0]} alone on {single:.1%}"
    )
    if len(asked) > 2 and majority > single:
        return Chosen("vote", asked, {}, why, accuracy, told, majority, single)
    who = aggregator or asked[0]
    why += f"; {who} aggregates" + (", which was not measured" if aggregator is None else "")
    return Chosen("aggregate", asked, {"aggregator": who}, why, accuracy, told, majority, single)


def _check(table: OutcomeTable, *, near: float, overlap: float, z: float) -> None:
    faults = [
        Fault(name, f"is {value:g}", "0 to 1")
        for name, value in (("near", near), ("overlap", overlap))
        if not 0 <= value <= 1
    ]
    if not (math.isfinite(z) and z >= 0):
        faults.append(Fault("z", f"is {z:g}", "0 or more"))
    if np.isnan(table.score).all():
        faults.append(Fault("outcomes", "hold no known score"))
    if faults:
        raise MixmergeError(faults)


def _behind(known: Flags, right: Flags, best: int, other: int) -> float:
    """How much less often the other is right than the best, on the queries that both answered."""
    shared = known[:, best] & known[:, other]
    if not shared.any():
        return math.inf
    # Counts first: 0.9 - 0.85 is a little more than 0.05.
    return (int(right[shared, best].sum()) - int(right[shared, other].sum())) / int(shared.sum())


def _overlap(pair: Sequence[str], known: Flags, right: Flags, at: Mapping[str, int], z: float) -> Overlap:
    first, second = (at[name] for name in pair)
    shared = known[:, first] & known[:, second]
    wrong = ~right[shared][:, [first, second]]
    fewer, both = int(wrong.sum(axis=0).min(initial=len(wrong))), int(wrong.all(axis=1).sum())
    share = both / fewer if fewer else 1.0
    names = (pair[0], pair[1])
    return Overlap(names, int(shared.sum()), fewer, both, share, wilson_upper(both, fewer, z=z))


def wilson_upper(count: int, of: int, *, z: float) -> float:
    """Upper end of Wilson's score interval of a share, 0 to 1; 1 of nothing."""
    if not of:
        return 1.0
    share, spread = count / of, z * z / of
    middle = share + spread / 2
    root = z * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return min((middle + root) / (1 + spread), 1.0)
