"""From what a method thinks of an expert to the score to expect of it. Q queries, E experts, M members.

Methods that rank experts (by pairs, by contrast) give strengths without a scale. A line through each expert's mean
gives them one: ``score = mean + slope * (strength - center)``, fitted on queries the method did not train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.routers.base import Prediction
from mixmerge.routers.shrinkage import moments

Floats = NDArray[np.float64]
# Of a state: what ``calibrated`` makes and ``expected`` reads; the experts are the last axis of each.
CALIBRATION = ("average", "error", "center", "slope", "spread")


@dataclass(frozen=True, eq=False)
class Slopes:
    """``(E,)`` each: where a line goes through the expert's mean, its slope, and the variance of that slope."""

    center: Floats
    slope: Floats
    spread: Floats


def fit_slopes(strength: Floats, score: Floats) -> Slopes:
    """Slopes of scores on strengths, twice shrunk and never negative.

    The slope of all experts together is pulled to 0 by as much as it may be chance (positive-part James-Stein);
    each expert's own slope is pulled to that one, by empirical Bayes with the variance between experts found by
    moments (DerSimonian and Laird, 1986). Without rows, or with strengths all alike, the slopes are 0.

    Args:
        strength: ``(Q, E)``, finite.
        score: ``(Q, E)``, NaN where missing.
    """
    known = ~np.isnan(score)
    count = np.maximum(known.sum(axis=0), 1)
    center = np.where(known, strength, 0.0).sum(axis=0) / count
    mean = np.where(known, score, 0.0).sum(axis=0) / count
    x, y = np.where(known, strength - center, 0.0), np.where(known, score - mean, 0.0)
    xx, xy = (x**2).sum(axis=0), (x * y).sum(axis=0)
    if xx.sum() <= 1e-12:
        return Slopes(center, np.zeros_like(xx), np.zeros_like(xx))
    together = xy.sum() / xx.sum()
    left = max(int(known.sum()) - score.shape[1] - 1, 1)
    noise = max(float(((y - together * x) ** 2).sum()) / left, 1e-12)
    chance = noise / xx.sum()
    together = max(together - chance / together, 0.0) if together > 0 else 0.0
    own, variance = xy / np.maximum(xx, 1e-12), noise / np.maximum(xx, 1e-12)
    trust = _between(own, variance, together)
    slope = np.maximum(together + trust * (own - together), 0.0)
    return Slopes(center, slope, chance + trust * variance)


def _between(own: Floats, variance: Floats, together: float) -> Floats:
    """``(E,)``: how far each own slope is believed, 0 to 1."""
    weight = 1.0 / variance
    size = weight.sum() - (weight**2).sum() / weight.sum()
    excess = (weight * (own - together) ** 2).sum() - (len(own) - 1)
    apart = max(float(excess), 0.0) / size if size > 1e-9 * weight.sum() else 0.0
    return np.asarray(apart / (apart + variance), np.float64)


def calibrated(
    strengths: Sequence[Floats], held: Sequence[NDArray[np.bool_]], score: Floats
) -> dict[str, Floats]:
    """The arrays of ``CALIBRATION``: a line for each member, from the queries it did not train on.

    Args:
        strengths: for each member ``(Q, E)`` on all queries.
        held: for each member ``(Q,)``, the queries it did not train on.
        score: ``(Q, E)``, NaN where missing: the means are from all of it.
    """
    lines = [fit_slopes(strength[rows], score[rows]) for strength, rows in zip(strengths, held, strict=True)]
    mean, variance, count = moments(score)
    return {
        "average": mean,
        "error": variance / np.maximum(count, 1),
        "center": np.stack([line.center for line in lines]),
        "slope": np.stack([line.slope for line in lines]),
        "spread": np.stack([line.spread for line in lines]),
    }


def expected(strengths: Floats, arrays: Mapping[str, NDArray[Any]]) -> Prediction:
    """Expected scores: the mean over members; and the standard deviation of that.

    Its square is the sum of the expert's standard error, what the slope may be off by at this strength, and what
    the members differ by.

    Args:
        strengths: ``(M, Q, E)``.
        arrays: of ``calibrated``.
    """
    away = strengths - arrays["center"][:, None, :]
    scores = arrays["average"] + arrays["slope"][:, None, :] * away
    tilt = (arrays["spread"][:, None, :] * away**2).mean(axis=0)
    return Prediction(scores.mean(axis=0), np.sqrt(arrays["error"] + tilt + apart(scores)))


def apart(scores: Floats) -> Floats:
    """``(Q, E)`` variance between the members of ``(M, Q, E)``; 0 if there is one."""
    if len(scores) == 1:
        return np.zeros(scores.shape[1:])
    return np.asarray(scores.var(axis=0, ddof=1), np.float64)


def moves(experts: Sequence[str], average: Floats, mean: Floats, *, top: int) -> list[dict[str, Any]]:
    """For each query the ``top`` experts whose expected score is furthest from their mean: ``moves``.

    Args:
        average: ``(E,)`` mean scores.
        mean: ``(Q, E)`` expected scores.
    """
    return [
        {
            "moves": [
                {"expert": experts[e], "mean": round(float(average[e]), 4), "here": round(float(row[e]), 4)}
                for e in np.argsort(-np.abs(row - average), kind="stable")[:top]
            ]
        }
        for row in mean
    ]
