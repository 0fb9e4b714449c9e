"""Self-consistency: one expert answers several times, and votes with itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixmerge.aggregate.asking import named, ranked, samples_of, unanswered
from mixmerge.aggregate.extraction import extractor
from mixmerge.aggregate.options import SelfConsistencyOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled
from mixmerge.aggregate.vote import settle_vote, tally


@dataclass(frozen=True)
class SelfConsistency(Composition):
    """Samples of the primary at a temperature, voted; the first sample of the winning side stands.

    Source: Zhang et al. (2025), The Avengers, arXiv 2505.19797, and its released code: 10 samples at temperature 0.7.
    Deviations: if all samples fail, the next of the picks is asked in the primary's place.
    """

    options: SelfConsistencyOptions = field(default_factory=SelfConsistencyOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return self._samples(self._order(question)[0])

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        order, stage = self._order(question), len(said) - 1
        reason: dict[str, object] = {"kind": "self_consistency", "extract": self.options.extract}
        if stage:
            reason["fallback"] = order[0]
        samples = sorted(said[stage], key=lambda one: one.ask.draw)
        counted = tally(samples, extractor(self.options.extract))
        settled = settle_vote(counted, stage, said, reason)
        if settled is not None:
            return settled
        return self._samples(order[stage + 1]) if stage + 1 < len(order) else unanswered(said, reason)

    def experts(self) -> frozenset[str]:
        return named(self.options.expert)

    def _order(self, question: Question) -> tuple[str, ...]:
        first = (self.options.expert,) if self.options.expert else ()
        return tuple(dict.fromkeys((*first, *ranked(question))))

    def _samples(self, expert: str) -> tuple[Ask, ...]:
        return samples_of(expert, self.options.samples, temperature=self.options.temperature)
