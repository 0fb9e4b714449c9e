"""Mixture-of-Agents: layers of experts that see the answers of the layer before, and one that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixmerge.aggregate.asking import by_rank, named, picks_of, ranked, samples_of, telling, unanswered
from mixmerge.aggregate.options import MoaOptions, SelfMoaOptions
from mixmerge.aggregate.prompts import with_answers
from mixmerge.aggregate.records import Ask, Composition, Prompt, Question, Said, Settled
from mixmerge.aggregate.synthesis import aggregator_of, ask_aggregator, settle_last


@dataclass(frozen=True)
class Moa(Composition):
    """Proposers answer; in every further layer they answer again, shown the answers of the layer before; last of all
    one aggregator does. With n proposers and L layers that are ``n (L - 1) + 1`` calls.

    Calls that fail are left out; a layer of which nothing is left is passed over, and the next is shown the answers of
    the one before it. If the aggregator gives no answer, the best-ranked of the last layer stands.

    Source: Mixture-of-Agents (togethercomputer/MoA), as released: temperature 0.7 of the proposers, one aggregator.
    Deviations: the prompt is ours, and answers are shown in the last turn of the user, not in one of the system.
    """

    options: MoaOptions = field(default_factory=MoaOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return self._layer(question, None)

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        reason = {
            "kind": "moa",
            "layers": self.options.layers,
            "aggregator": aggregator_of(question, self.options),
        }
        layers = said[: self.options.layers - 1]
        latest = [(stage, one) for stage, all_of_it in enumerate(layers) for one in telling(all_of_it)]
        stage = max((stage for stage, _ in latest), default=0)
        answers = self._in_order(question, [one for at, one in latest if at == stage])
        if len(said) == self.options.layers:
            return settle_last(said, [(stage, one) for one in answers], reason)
        if not answers:
            return unanswered(said, reason)
        if len(said) == self.options.layers - 1:
            return ask_aggregator(question, self.options, answers)
        return self._layer(question, with_answers(question.prompt, [one.text for one in answers]))

    def experts(self) -> frozenset[str]:
        return named(self.options.aggregator, *(self.options.proposers or ()))

    def _layer(self, question: Question, prompt: Prompt | None) -> tuple[Ask, ...]:
        if self.options.proposers is not None:
            who = [(name, 0, 1.0) for name in self.options.proposers]
        else:
            who = [(pick.expert, pick.draw, pick.weight) for pick in picks_of(question)]
        return tuple(Ask(name, draw, weight, prompt, self.options.temperature) for name, draw, weight in who)

    def _in_order(self, question: Question, answers: Sequence[Said]) -> list[Said]:
        order = self.options.proposers
        if order is None:
            return by_rank(question, answers)
        return sorted(answers, key=lambda one: order.index(one.ask.expert))


@dataclass(frozen=True)
class SelfMoa(Composition):
    """Samples of the single best expert, and one answer made of them, by default by the same expert.

    Source: Self-MoA (arXiv 2502.00674). The prompt, the number of samples and their temperature are ours.
    """

    options: SelfMoaOptions = field(default_factory=SelfMoaOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        expert = self.options.expert or ranked(question)[0]
        return samples_of(expert, self.options.samples, temperature=self.options.temperature)

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        expert = self.options.expert or ranked(question)[0]
        reason = {"kind": "self_moa", "aggregator": self.options.aggregator or expert}
        answers = sorted(telling(said[0]), key=lambda one: one.ask.draw)
        if len(said) > 1:
            return settle_last(said, [(0, one) for one in answers], reason)
        return ask_aggregator(question, self.options, answers, expert=expert) or unanswered(said, reason)

    def experts(self) -> frozenset[str]:
        return named(self.options.expert, self.options.aggregator)
