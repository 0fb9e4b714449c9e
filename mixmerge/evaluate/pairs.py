"""Routers between two experts, beside chance, the prompt's length and the oracles. Q queries, D draws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Scores
from mixmerge.evaluate.curves import exact_share_curve, resampled_apgr, share_curve
from mixmerge.evaluate.intervals import Estimate, compare, estimate, mean_over_repeats
from mixmerge.evaluate.measuring import RANDOM, Ground
from mixmerge.evaluate.records import PairFigures, PairReport
from mixmerge.routers.draws import uniform
from mixmerge.routers.trained import text_hashes

Floats = NDArray[np.float64]
LENGTH = "prompt length"
CALLS = (0.2, 0.5, 0.8)


def pair_report(ground: Ground, scores: Mapping[str, Scores], *, strong: str, draws: int) -> PairReport:
    """Every router's preference for the strong expert, and what stands beside it.

    Args:
        ground: a table of two experts.
        scores: router -> its scores of both.
        strong: the expert whose calls are counted; meant to be the better and dearer one.
        draws: of the random preference.
    """
    table = ground.table
    first = table.experts.index(strong)
    weak = table.experts[1 - first]
    known = np.asarray(~np.isnan(table.score).any(axis=1), np.bool_)
    of_strong, of_weak = table.score[known, first], table.score[known, 1 - first]
    texts = [text for text, there in zip(table.queries, known, strict=True) if there]
    preferences = {
        name: (one.mean[:, one.experts.index(strong)] - one.mean[:, one.experts.index(weak)])[known]
        for name, one in scores.items()
    }
    preferences[LENGTH] = np.array([len(text) for text in texts], np.float64)
    if not len(texts):
        return PairReport(weak, strong, 0, {})
    # Scores have few values, and equal preferences would go together: a draw decides among them.
    drawn = uniform(text_hashes(texts), np.full(1, draws, np.uint64), seed=ground.seed)[:, 0]
    for name, known_score in (("oracle (gain)", of_strong - of_weak), ("oracle (weak is wrong)", -of_weak)):
        _, rank = np.unique(known_score, return_inverse=True)
        preferences[name] = rank + drawn
    rows = _rows(ground, preferences, of_weak, of_strong, known)
    rows[RANDOM] = _random(texts, of_weak, of_strong, draws=draws, seed=ground.seed, level=ground.level)
    return PairReport(weak, strong, len(texts), rows)


def _rows(
    ground: Ground,
    preferences: Mapping[str, Floats],
    weak: Floats,
    strong: Floats,
    known: NDArray[np.bool_],
) -> dict[str, PairFigures]:
    _, groups = np.unique(ground.groups[known], return_inverse=True)
    stacked = np.stack(list(preferences.values()), axis=1)
    drawn = resampled_apgr(
        stacked, weak, strong, groups.reshape(-1), resamples=ground.resamples, seed=ground.seed
    )
    length = list(preferences).index(LENGTH)
    by_length = share_curve(preferences[LENGTH], weak, strong).apgr()
    rows = {}
    for i, (name, preference) in enumerate(preferences.items()):
        curve = share_curve(preference, weak, strong)
        value, over = curve.apgr(), drawn[:, i] - drawn[:, length]
        rows[name] = PairFigures(
            apgr=estimate(value, drawn[:, i], level=ground.level),
            exact=exact_share_curve(preference, weak, strong).apgr(),
            calls={part: curve.calls(part) for part in CALLS},
            over_length=None if i == length else compare(value - by_length, over, level=ground.level),
            curve=curve,
        )
    return rows


def _random(
    texts: list[str], weak: Floats, strong: Floats, *, draws: int, seed: int, level: float
) -> PairFigures:
    """The mean of draws, with the interval of that mean."""
    drawn = uniform(text_hashes(texts), np.arange(draws, dtype=np.uint64), seed=seed)
    curves = [share_curve(column, weak, strong) for column in drawn.T]
    apgr: Estimate = mean_over_repeats([curve.apgr() for curve in curves], level=level)
    calls = {part: float(np.mean([curve.calls(part) for curve in curves])) for part in CALLS}
    exact = float(np.mean([exact_share_curve(column, weak, strong).apgr() for column in drawn.T]))
    return PairFigures(apgr, exact, calls, None, None)
