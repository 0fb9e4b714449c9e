"""Whether expected scores come true. Q queries, E experts, N pairs of a prediction and an outcome, K bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True, eq=False)
class Reliability:
    """Predictions in bins of equal mass, beside what happened.

    Args:
        count: ``(K,)`` pairs in each bin; bins without any are not there.
        predicted, actual: ``(K,)`` mean prediction and mean outcome.
    """

    count: Floats
    predicted: Floats
    actual: Floats

    def error(self) -> float:
        """Expected calibration error: the mean distance of the two, by count. NaN without pairs.

        A few hundred pairs leave some error even in perfect predictions: about ``std / sqrt(N / K)`` of noise in
        each bin.
        """
        total = self.count.sum()
        return (
            float((self.count * np.abs(self.predicted - self.actual)).sum() / total)
            if total
            else float("nan")
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Of all experts' predictions together, and of each expert's; experts without outcomes are left out."""

    pooled: Reliability
    experts: Mapping[str, Reliability]


def reliability(predicted: Floats, actual: Floats, *, bins: int = BINS) -> Reliability:
    """Bins between the quantiles of the predictions; equal predictions share a bin.

    Args:
        predicted, actual: ``(N,)``; pairs with a NaN are left out.
        bins: 1 or more.
    """
    known = ~(np.isnan(predicted) | np.isnan(actual))
    given, real = predicted[known], actual[known]
    if not given.size:
        return Reliability(np.empty(0), np.empty(0), np.empty(0))
    edges = np.unique(np.quantile(given, np.linspace(0, 1, bins + 1)[1:-1]))
    of = np.searchsorted(edges, given, side="left")
    count = np.bincount(of, minlength=len(edges) + 1).astype(np.float64)
    used = count > 0
    sums = [np.bincount(of, weights=part, minlength=len(edges) + 1)[used] for part in (given, real)]
    return Reliability(count[used], sums[0] / count[used], sums[1] / count[used])


def calibration(mean: Floats, score: Floats, experts: Sequence[str], *, bins: int = BINS) -> Calibration:
    """Of ``(Q, E)`` expected scores against the known ones, those of experts that were not chosen too."""
    each = {name: reliability(mean[:, e], score[:, e], bins=bins) for e, name in enumerate(experts)}
    return Calibration(
        reliability(mean.ravel(), score.ravel(), bins=bins),
        {name: one for name, one in each.items() if one.count.size},
    )
