"""Votes: what most experts say, by what their answers count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmerge.aggregate.asking import by_rank, given, picks_of, settle, unanswered
from mixmerge.aggregate.extraction import Extract, extractor
from mixmerge.aggregate.options import VoteOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled

TIE = 1e-9  # totals that differ by a smaller part of the larger are equal: sums of weights are rounded
SHOWN = 200  # characters of an answer in a reason


@dataclass(frozen=True)
class Side:
    """An answer, and those who give it.

    Args:
        answer: as it was extracted.
        weight: that its answers have together.
        said: those answers, best-ranked first.
    """

    answer: str
    weight: float
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Tally:
    """A vote that was counted.

    Args:
        sides: the winner first, then by weight; of equal ones the one with the best-ranked answer.
        abstained: answers that say nothing that can be counted.
    """

    sides: tuple[Side, ...]
    abstained: tuple[Said, ...]

    @property
    def agreement(self) -> float:
        """The winner's share of the weight that was cast; of the answers where all weights are 0. 0 without votes."""
        if not self.sides:
            return 0.0
        total = math.fsum(side.weight for side in self.sides)
        if total > 0:
            return min(self.sides[0].weight / total, 1.0)
        return len(self.sides[0].said) / sum(len(side.said) for side in self.sides)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; long answers are cut."""
        return {
            "agreement": self.agreement,
            "votes": [
                {
                    "answer": side.answer[:SHOWN],
                    "count": len(side.said),
                    "weight": side.weight,
                    "experts": [one.ask.expert for one in side.said],
                }
                for side in self.sides
            ],
            "abstained": [one.ask.expert for one in self.abstained],
        }


def tally(said: Sequence[Said], extract: Extract, weights: Sequence[float] | None = None) -> Tally:
    """Count what was said.

    Args:
        said: best-ranked first. Calls that failed are not counted.
        extract: what an answer says; answers that are equal then are one side.
        weights: of each, 0 or more; 1 by default.
    """
    sides: dict[str, list[tuple[float, Said]]] = {}
    abstained = []
    for one, weight in zip(said, [1.0] * len(said) if weights is None else weights, strict=True):
        answer = extract(one.text) if one.fault is None else None
        if answer is not None:
            sides.setdefault(answer, []).append((weight, one))
        elif one.fault is None:
            abstained.append(one)
    waiting = [
        Side(answer, math.fsum(weight for weight, _ in cast), tuple(one for _, one in cast))
        for answer, cast in sides.items()
    ]
    found = []
    while waiting:
        top = max(side.weight for side in waiting)
        # Sides are in the order of their best-ranked answers, so of equal ones the first wins.
        found.append(next(side for side in waiting if side.weight >= top - TIE * abs(top)))
        waiting.remove(found[-1])
    return Tally(tuple(found), tuple(abstained))


def settle_vote(
    counted: Tally, stage: int, said: Sequence[Sequence[Said]], reason: dict[str, Any]
) -> Settled | None:
    """The best-ranked answer of the winning side; without votes the best-ranked answer; None without answers."""
    told = {**reason, **counted.as_dict()}
    if counted.sides:
        return settle(counted.sides[0].said[0], stage, said, told)
    if counted.abstained:
        return settle(counted.abstained[0], stage, said, {**told, "fallback": "no answer could be read"})
    return None


def certainty(said: Said) -> float:
    """Geometric mean of the probabilities of an answer's tokens, 0 to 1; NaN where they are not known."""
    if not said.logprobs:
        return math.nan
    return math.exp(min(math.fsum(said.logprobs) / len(said.logprobs), 0.0))


@dataclass(frozen=True)
class Vote(Composition):
    """All picks answer, and the answer with the most weight stands, in the words of its best-ranked expert.

    Ties go to the side of the best-ranked expert. Calls that fail and answers that say nothing do not vote; where
    nobody votes the best-ranked answer stands.
    """

    options: VoteOptions = field(default_factory=VoteOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return tuple(
            Ask(
                pick.expert,
                pick.draw,
                pick.weight if self.options.weights == "picks" else 1.0,
                temperature=self.options.temperature,
                logprobs=self.options.confidence,
            )
            for pick in picks_of(question)
        )

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        cast = by_rank(question, given(said[0]))
        counted = tally(cast, extractor(self.options.extract), [self._weight(one) for one in cast])
        reason = {"kind": "vote", "extract": self.options.extract}
        return settle_vote(counted, 0, said, reason) or unanswered(said, reason)

    def _weight(self, said: Said) -> float:
        if not self.options.confidence:
            return said.ask.weight
        sure = certainty(said)
        return 0.0 if math.isnan(sure) else said.ask.weight * sure
