"""Self-MoA-Seq: many samples of one expert, made into one answer a window at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixmerge.aggregate.asking import named, ranked, samples_of, telling, unanswered
from mixmerge.aggregate.options import SelfMoaSeqOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled
from mixmerge.aggregate.synthesis import ask_aggregator, settle_last


@dataclass(frozen=True)
class SelfMoaSeq(Composition):
    """The first window of samples is made into one answer, that and the next samples into another, until all are used.

    The current answer fills the ``reserved`` first places of the window, which biases the aggregator towards it; the
    prompt never holds more than ``window`` answers, and the calls grow linearly with the samples. If the aggregator
    gives no answer to a window, the answer before stays and the window's samples are lost; if it never gives one, the
    first sample stands.

    Source: Self-MoA-Seq (arXiv 2502.00674). A window of 6 is the paper's as remembered, not verified; the prompt, the
    number of reserved places and of samples are ours.
    """

    options: SelfMoaSeqOptions = field(default_factory=SelfMoaSeqOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return samples_of(self._expert(question), self.options.samples, temperature=self.options.temperature)

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        expert = self._expert(question)
        samples = sorted(telling(said[0]), key=lambda one: one.ask.draw)
        current: tuple[int, Said] | None = None
        used = 0
        for stage, window in enumerate(said[1:], start=1):
            used += self._room(current)
            found = telling(window)
            current = (stage, found[0]) if found else current
        if used < len(samples):
            kept = [] if current is None else [current[1]] * self.options.reserved
            shown = [*kept, *samples[used : used + self._room(current)]]
            return ask_aggregator(question, self.options, shown, expert=expert)
        reason = {
            "kind": "self_moa_seq",
            "aggregator": self.options.aggregator or expert,
            "windows": len(said) - 1,
        }
        if not samples:
            return unanswered(said, reason)
        return settle_last(said, [current or (0, samples[0])], reason)

    def experts(self) -> frozenset[str]:
        return named(self.options.expert, self.options.aggregator)

    def _expert(self, question: Question) -> str:
        return self.options.expert or ranked(question)[0]

    def _room(self, current: tuple[int, Said] | None) -> int:
        """New samples in the next window."""
        return self.options.window - (0 if current is None else self.options.reserved)
