"""How sure a mean is: bootstrap over queries, paired comparisons, means over repeats.

Q queries, G groups of queries with the same text, B resamples, M columns of values. Groups are drawn, not rows:
two rows with one text are not two observations. What is drawn depends on the seed and the texts alone, so the order
of the queries changes nothing but the last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.routers.trained import text_hashes

Floats = NDArray[np.float64]
LEVEL = 0.95
_BLOCK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A paired difference.

    Args:
        difference: mean of the one minus mean of the other, over the queries where both are known.
        p: two-sided, of no difference; what the interval says, as a number.
    """

    difference: Estimate
    p: float


def groups_of(texts: Sequence[str]) -> NDArray[np.int64]:
    """``(Q,)`` number of each text's group, 0 to G - 1 in the order of the texts' hashes."""
    _, group = np.unique(text_hashes(texts), return_inverse=True)
    return np.asarray(group, np.int64).reshape(-1)


def resampled(groups: NDArray[np.int64], *, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn: blocks of ``(b, G)``, B rows in all."""
    size = int(groups.max()) + 1
    rng, block = np.random.default_rng(seed), max(1, _BLOCK // size)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def bootstrap_means(values: Floats, groups: NDArray[np.int64], *, resamples: int, seed: int) -> Floats:
    """``(B, M)`` means of the columns of ``(Q, M)`` values, the same queries drawn for all of them.

    Missing values (NaN) count for nothing; a resample without a known value gives NaN.
    """
    known = ~np.isnan(values)
    size = int(groups.max()) + 1
    total, count = np.zeros((size, values.shape[1])), np.zeros((size, values.shape[1]))
    np.add.at(total, groups, np.where(known, values, 0.0))
    np.add.at(count, groups, known.astype(np.float64))
    means = []
    for drawn in resampled(groups, resamples=resamples, seed=seed):
        number = drawn @ count
        means.append(np.where(number > 0, drawn @ total / np.maximum(number, 1), np.nan))
    return np.concatenate(means)


def bootstrap(
    statistic: Callable[[Floats], Floats], groups: NDArray[np.int64], *, resamples: int, seed: int
) -> Floats:
    """``(B, S)`` of any statistic.

    Args:
        statistic: from ``(Q,)``, how often each query is drawn, to ``(S,)``.
        groups, resamples, seed: as for ``bootstrap_means``; the same ones draw the same queries.
    """
    return np.array(
        [
            statistic(drawn[groups])
            for block in resampled(groups, resamples=resamples, seed=seed)
            for drawn in block
        ]
    )


def estimate(value: float, resamples: Floats, *, level: float = LEVEL) -> Estimate:
    """The percentile interval of ``(B,)`` resampled values, those that are NaN left out."""
    known = resamples[~np.isnan(resamples)]
    if not known.size:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def compare(value: float, resamples: Floats, *, level: float = LEVEL) -> Comparison:
    """A difference and ``(B,)`` of its resamples, with twice the smaller tail beyond zero as p.

    Equal experts on all queries give p = 1; the smallest p is 2 / (B + 1).
    """
    known = resamples[~np.isnan(resamples)]
    if not known.size:
        return Comparison(estimate(value, resamples, level=level), float("nan"))
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return Comparison(estimate(value, resamples, level=level), min(1.0, 2 * (tail + 1) / (known.size + 1)))


def paired_bootstrap(
    first: Floats,
    second: Floats,
    texts: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Comparison:
    """Whether the mean of ``first`` is above that of ``second``, ``(Q,)`` each; NaN in either leaves a query out."""
    difference = np.asarray(first - second, np.float64)
    means = bootstrap_means(difference[:, None], groups_of(texts), resamples=resamples, seed=seed)
    return compare(mean_of(difference), means[:, 0], level=level)


def mean_of(values: Floats) -> float:
    """Mean of the known values, NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def mean_over_repeats(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Mean of repeated draws (seeds, splits) with Student's t interval.

    It says how far the mean would move with further draws on the same queries, not with other queries: that is what
    the bootstrap is for. A single value has no interval.
    """
    from scipy.stats import t

    given = np.asarray(values, np.float64)
    mean = float(given.mean())
    if len(given) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(t.ppf((1 + level) / 2, len(given) - 1) * given.std(ddof=1) / len(given) ** 0.5)
    return Estimate(mean, mean - half, mean + half)
