"""Best of several: the answer that its own expert found likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mixmerge.aggregate.asking import by_rank, given, picks_of, settle, unanswered
from mixmerge.aggregate.options import BestOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled


@dataclass(frozen=True)
class BestOf(Composition):
    """All picks answer; the answer whose tokens have the highest mean (or total) log-probability stands.

    Ties go to the best-ranked expert; an answer whose log-probabilities are not known comes after all others. Experts
    differ in how sure they sound, so this is meant for draws of one expert or experts of one kind.
    """

    options: BestOptions = field(default_factory=BestOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return tuple(
            Ask(pick.expert, pick.draw, pick.weight, temperature=self.options.temperature, logprobs=True)
            for pick in picks_of(question)
        )

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        found = by_rank(question, given(said[0]))
        scores = [self._score(one) for one in found]
        reason = {
            "kind": "best",
            "score": self.options.score,
            "scores": [
                {
                    "expert": one.ask.expert,
                    "draw": one.ask.draw,
                    "score": score if math.isfinite(score) else None,
                }
                for one, score in zip(found, scores, strict=True)
            ],
        }
        if not found:
            return unanswered(said, reason)
        return settle(found[scores.index(max(scores))], 0, said, reason)

    def _score(self, said: Said) -> float:
        if not said.logprobs:
            return -math.inf
        total = math.fsum(said.logprobs)
        score = total if self.options.score == "sum" else total / len(said.logprobs)
        return -math.inf if math.isnan(score) else score
