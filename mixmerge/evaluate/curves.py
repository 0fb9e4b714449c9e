"""Two experts, and how much of the stronger one's lead a router recovers for how many calls to it.

Q queries, T thresholds, P points of a curve, R routers, B resamples. A router prefers the strong expert the more, the
larger its ``preference`` for it; any scale will do.

Source: Ong et al. (2024), RouteLLM, arXiv 2406.18665, section 3.2. APGR is an integral, taken there as a mean over ten
shares; here it is taken by trapezoids, as in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.evaluate.intervals import bootstrap

Floats = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True, eq=False)
class ShareCurve:
    """Mean score against the share of queries that go to the strong expert.

    Args:
        share: ``(P,)`` rising from 0 to 1.
        score: ``(P,)`` mean score there.
        weak, strong: mean scores of the two experts.
    """

    share: Floats
    score: Floats
    weak: float
    strong: float

    def recovered(self) -> Floats:
        """``(P,)`` performance gap recovered: 0 for the weak expert, 1 for the strong; NaN if they are equal."""
        gap = self.strong - self.weak
        return (self.score - self.weak) / gap if gap != 0 else np.full(len(self.score), np.nan)

    def apgr(self) -> float:
        """Average performance gap recovered: the area under ``recovered``, by trapezoids. 0.5 is chance."""
        gap = self.recovered()
        return float(((gap[1:] + gap[:-1]) / 2 * np.diff(self.share)).sum())

    def calls(self, recovered: float) -> float:
        """Call-performance threshold, CPT: the smallest share that recovers so much of the gap, 0 to 1.

        Linear between points. RouteLLM's code interpolates the share over the score, which is not defined where the
        curve falls; here it is the first crossing. NaN if the strong expert is not better.
        """
        gap = self.recovered()
        if self.strong <= self.weak:
            return float("nan")
        at = int(np.argmax(gap >= recovered - 1e-12))  # the last point, the strong expert alone, recovers 1
        if at == 0 or gap[at] == gap[at - 1]:
            return float(self.share[at])
        part = (recovered - gap[at - 1]) / (gap[at] - gap[at - 1])
        return float(self.share[at - 1] + part * (self.share[at] - self.share[at - 1]))


def share_curve(
    preference: Floats, weak: Floats, strong: Floats, *, bins: int = BINS, drawn: Floats | None = None
) -> ShareCurve:
    """The curve as RouteLLM draws it: thresholds at the quantiles of ``bins`` parts of equal mass.

    At every threshold the strong expert gets the queries at or above it; at the last one those above it, which are
    none. Equal quantiles are one threshold. Deviation: where all preferences are equal RouteLLM has a single point;
    here there are two, both experts alone, so APGR is 0.5.

    Args:
        preference: ``(Q,)`` for the strong expert.
        weak, strong: ``(Q,)`` scores of the experts.
        bins: 1 or more.
        drawn: ``(Q,)`` how often each query counts; once by default.
    """
    sorted_ = _Sorted.of(preference, weak, strong, drawn)
    number = sorted_.until[-1]
    place = np.round(np.linspace(0.0, 1.0, bins + 1) * (number - 1), 9)
    low, high = np.floor(place), np.ceil(place)
    below = sorted_.preference[np.searchsorted(sorted_.until, low, side="right") - 1]
    above = sorted_.preference[np.searchsorted(sorted_.until, high, side="right") - 1]
    thresholds = np.unique(below + (place - low) * (above - below))
    cuts = np.searchsorted(sorted_.preference, thresholds[:-1], side="left")
    return sorted_.curve(cuts)


def exact_share_curve(
    preference: Floats, weak: Floats, strong: Floats, *, drawn: Floats | None = None
) -> ShareCurve:
    """The same with every threshold that makes a difference, instead of ten quantiles. Arguments as there."""
    sorted_ = _Sorted.of(preference, weak, strong, drawn)
    return sorted_.curve(np.flatnonzero(np.diff(sorted_.preference) > 0) + 1)


def resampled_apgr(
    preferences: Floats,
    weak: Floats,
    strong: Floats,
    groups: NDArray[np.int64],
    *,
    resamples: int,
    seed: int,
    bins: int = BINS,
) -> Floats:
    """``(B, R)`` APGR of ``(Q, R)`` preferences, the same queries drawn for all of them."""
    order = [np.argsort(column, kind="stable") for column in preferences.T]
    ready = [(preferences[o, r], weak[o], strong[o], o) for r, o in enumerate(order)]

    def statistic(drawn: Floats) -> Floats:
        return np.array([share_curve(p, w, s, bins=bins, drawn=drawn[o]).apgr() for p, w, s, o in ready])

    return bootstrap(statistic, groups, resamples=resamples, seed=seed)


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Queries by rising preference: ``(Q,)`` preference, and ``(Q + 1,)`` running sums of number and scores."""

    preference: Floats
    until: Floats
    weak: Floats
    strong: Floats

    @classmethod
    def of(cls, preference: Floats, weak: Floats, strong: Floats, drawn: Floats | None) -> _Sorted:
        times = np.ones(len(preference)) if drawn is None else drawn
        if (np.diff(preference) < 0).any():
            order = np.argsort(preference, kind="stable")
            preference, weak, strong, times = preference[order], weak[order], strong[order], times[order]
        sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (times, times * weak, times * strong)]
        return cls(preference, *sums)

    def curve(self, cuts: NDArray[np.int64]) -> ShareCurve:
        """Strong from each cut on, weak before it; both ends, each expert alone, are always points."""
        at = np.concatenate([[0], cuts, [len(self.preference)]])
        _, first = np.unique(self.until[at], return_index=True)  # queries that are not drawn make no points
        at = at[first[::-1]]
        number = self.until[-1]
        score = (self.weak[at] + self.strong[-1] - self.strong[at]) / number
        return ShareCurve(
            1 - self.until[at] / number,
            score,
            float(self.weak[-1] / number),
            float(self.strong[-1] / number),
        )
