"""What experts are worth at each skill, and what follows for a query. Q queries, E experts, K skills, M mentions.

A mention is one skill of one query. Mentions come query by query, and each knows its skill's place in the vocabulary
for every expert, or -1 where no skill there is near enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.routers.shrinkage import Floats, moments, shrink, strength

Places = NDArray[np.int64]
_FLATTEST, _STEEPEST = 0.0, 5.0  # bounds of a slope; above the second it amplifies noise
_BLOCK = 8192  # queries at a time: what is held of their mentions stays bounded


@dataclass(frozen=True, eq=False)
class Mentions:
    """Skills of queries.

    Args:
        row: ``(M,)`` the query of each mention, ascending.
        place: ``(M, E)`` the skill, -1 for none; or ``(M, 1)``, the same for every expert.
        queries: Q.
    """

    row: Places
    place: Places
    queries: int

    def take(self, of: Floats) -> Floats:
        """``(M, E)`` entries of a ``(K, E)`` table; 0 where there is none."""
        if not len(of):
            return np.zeros((len(self.row), of.shape[1]))
        if self.place.shape[1] == 1:
            return np.where(self.place >= 0, of[self.place[:, 0]], 0.0)
        return np.where(self.place >= 0, np.take_along_axis(of, np.maximum(self.place, 0), axis=0), 0.0)

    def sum(self, values: Floats) -> Floats:
        """``(Q, E)`` from ``(M, E)``: every query's mentions added."""
        total = np.zeros((self.queries, values.shape[1]))
        if len(self.row):
            starts = np.flatnonzero(np.diff(self.row, prepend=-1))
            total[self.row[starts]] = np.add.reduceat(values, starts, axis=0)
        return total

    def known(self, experts: int) -> Floats:
        """``(M, E)``: 1 where there is a skill."""
        return np.broadcast_to(self.place >= 0, (len(self.row), experts)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Tally:
    """``(K, E)`` each: sum and number of an expert's scores on queries that take a skill, and how many were right."""

    total: Floats
    count: Floats
    right: Floats


def tally(mentions: Mentions, score: Floats, right: Floats, *, skills: int) -> Tally:
    """Add outcomes up by skill.

    Args:
        mentions: with one place for all experts.
        score: ``(Q, E)``, NaN where missing.
        right: ``(Q, E)``, 1 or 0.
        skills: K.
    """
    kept = mentions.place[:, 0] >= 0
    row, place = mentions.row[kept], mentions.place[kept, 0]
    known = ~np.isnan(score)
    parts = (np.where(known, score, 0.0), known.astype(np.float64), np.where(known, right, 0.0))
    added = [np.zeros((skills, score.shape[1])) for _ in parts]
    for table, values in zip(added, parts, strict=True):
        np.add.at(table, place, values[row])
    return Tally(*added)


def signed_counts(done: Tally) -> Floats:
    """``(K, E)``: +1 for each right answer and -1 for each wrong one, added up.

    Source: Chen et al. (2025), Symbolic Mixture-of-Experts, arXiv 2503.05641; its released ``create_profile.py``.
    """
    return 2 * done.right - done.count


def shrunk_shares(done: Tally, right: Floats, known: NDArray[np.bool_]) -> Floats:
    """``(K, E)``: share of right answers at a skill, drawn to the expert's share of all: frequency does not count.

    Args:
        done: outcomes by skill.
        right: ``(Q, E)``, 1 or 0.
        known: ``(Q, E)``, where there is an outcome.
    """
    rate, variance, _ = moments(np.where(known, right, np.nan))
    share = done.right / np.maximum(done.count, 1)
    worth = strength(share, done.count, rate, variance)
    return shrink(done.right, done.count, rate, worth, variance)[0]


def suitability(mentions: Mentions, statistic: Floats) -> Floats:
    """``(Q, E)``: an expert's statistics at the skills of a query, added up.

    Source: as of ``signed_counts``; ``recruit_agents.py``. A skill the expert has no outcome on adds nothing.
    """
    return mentions.sum(mentions.take(statistic))


def competency(statistic: Floats, temperature: float = 0.5) -> Floats:
    """``(E,)``: what an expert is worth over all skills; adds up to 1.

    Its statistics are added up, raised by one less the smallest if any is negative, taken to the power
    ``1 / temperature`` and divided by their sum. Without any skill, all are worth the same.

    Source: as of ``signed_counts``; ``recruit_agents.py``, where the temperature is 0.5.

    Args:
        statistic: ``(K, E)``.
        temperature: above 0; the lower it is, the more the best expert counts.
    """
    total = statistic.sum(axis=0)
    total = total - total.min() + 1 if (total < 0).any() else total
    if not total.max() > 0:
        return np.full(len(total), 1 / len(total))
    powered = (total / total.max()) ** (1 / temperature)  # the quotient keeps a high power finite
    return np.asarray(powered / powered.sum())


def chances(suited: Floats, competent: Floats, mentioned: NDArray[np.bool_]) -> Floats:
    """``(Q, E)``: how likely each expert is to be drawn for a query; rows add up to 1.

    Suitability times competency of the experts whose suitability is above 0. If it is so for none, suitability is
    raised by one less its smallest. A query without skills draws from all alike.

    Source: as of ``signed_counts``; ``recruit_agents.py``.

    Args:
        suited: ``(Q, E)``.
        competent: ``(E,)``.
        mentioned: ``(Q,)``, whether a query has a skill.
    """
    fit = suited > 0
    none = ~fit.any(axis=1, keepdims=True)
    local = np.where(none, suited - suited.min(axis=1, keepdims=True) + 1, np.where(fit, suited, 0.0))
    weight = np.where(mentioned[:, None], local * competent, 1.0)
    # Every expert that is suited may be worth nothing over all; then its suitability decides alone.
    weight = np.where(weight.sum(axis=1, keepdims=True) > 0, weight, local)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Expectation:
    """What an expert is expected to score on queries that take a skill.

    Args:
        gain: ``(K, E)`` above its mean; 0 where it has no outcome.
        spread: ``(K, E)`` standard deviation of that expectation.
        mean: ``(E,)`` of all its scores.
        doubt: ``(E,)`` standard deviation for a query of which no skill is known.
        slope: ``(E,)`` what the mean gain of a query's skills is multiplied by: above 1 where skills add up.
        low, high: ``(E,)`` its lowest and highest score.
    """

    gain: Floats
    spread: Floats
    mean: Floats
    doubt: Floats
    slope: Floats
    low: Floats
    high: Floats

    @classmethod
    def fit(cls, mentions: Mentions, done: Tally, score: Floats) -> Expectation:
        """Shrink the mean score at each skill to the expert's mean, then fit the slope on queries held out one by one.

        Args:
            mentions: of the queries, with one place for all experts.
            done: outcomes by skill of the same queries.
            score: ``(Q, E)``, NaN where missing.
        """
        mean, variance, _ = moments(score)
        if not len(done.count):
            worth = np.full(len(mean), np.inf)
        else:
            worth = strength(done.total / np.maximum(done.count, 1), done.count, mean, variance)
        worth = np.minimum(worth, 1e6)
        expected, spread = shrink(done.total, done.count, mean, worth, variance)
        return cls(
            gain=np.where(done.count > 0, expected - mean, 0.0),
            spread=spread,
            mean=mean,
            doubt=np.sqrt(variance / worth),
            slope=_slopes(mentions, done, score, worth, variance),
            low=np.nanmin(score, axis=0),
            high=np.nanmax(score, axis=0),
        )

    def predict(self, mentions: Mentions) -> tuple[Floats, Floats]:
        """``(Q, E)`` expected score and its standard deviation.

        Expected: the expert's mean plus slope times the mean gain of the query's skills, between its lowest and
        highest score. The deviation takes the skills of a query for one and the same, which is the largest it can be.
        """
        number = mentions.sum(mentions.known(len(self.mean)))
        divisor = np.maximum(number, 1)
        gain = mentions.sum(mentions.take(self.gain)) / divisor
        spread = np.sqrt(mentions.sum(mentions.take(self.spread**2)) / divisor)
        mean = np.clip(self.mean + self.slope * gain, self.low, self.high)
        return mean, np.where(number > 0, spread, self.doubt)


def _slopes(mentions: Mentions, done: Tally, score: Floats, worth: Floats, variance: Floats) -> Floats:
    """``(E,)``: regression of scores on the gain that the other queries expect, drawn to 1.

    The prior is a normal one around 1 with deviation 1; an expert's slope depends on its own outcomes alone.
    """
    known = ~np.isnan(score)
    scored = np.where(known, score, 0.0)
    count = known.sum(axis=0)
    others = (scored.sum(axis=0) - scored) / np.maximum(count - 1, 1)  # (Q, E) mean of the other queries
    kept = mentions.place[:, 0] >= 0
    row, place = mentions.row[kept], mentions.place[kept, 0]
    covariance, square = np.zeros_like(variance), np.zeros_like(variance)
    for start in range(0, mentions.queries, _BLOCK):
        here = slice(*np.searchsorted(row, [start, start + _BLOCK]))
        of, skill = row[here], place[here]
        left = done.count[skill] - known[of]
        gain = (done.total[skill] - scored[of] + worth * others[of]) / (left + worth) - others[of]  # (M, E)
        held = Mentions(of - start, skill[:, None], min(_BLOCK, mentions.queries - start))
        queries = slice(start, start + held.queries)
        mean_gain = held.sum(gain) / np.maximum(held.sum(np.ones_like(gain)), 1)
        mean_gain = np.where(known[queries], mean_gain, 0.0)
        covariance += (mean_gain * (scored - others)[queries]).sum(axis=0)
        square += (mean_gain**2).sum(axis=0)
    return np.asarray(np.clip((covariance / variance + 1) / (square / variance + 1), _FLATTEST, _STEEPEST))
