"""One expert makes one answer of the picked experts': Symbolic-MoE's aggregator, and what others have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmerge.aggregate.asking import by_rank, named, picks_of, ranked, settle, telling, unanswered
from mixmerge.aggregate.options import AggregateOptions
from mixmerge.aggregate.prompts import with_answers
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled


@dataclass(frozen=True)
class Aggregate(Composition):
    """The picks answer, and the aggregator makes one answer of theirs; one round.

    It sees what they said without the thoughts before ``</think>``. Calls that fail and answers that say nothing are
    left out. If the aggregator gives no answer the best-ranked of the others stands; ``fallback`` in the reason.

    Source: Chen et al., Symbolic Mixture-of-Experts (arXiv 2503.05641), and its released ``aggregate.py``. Deviation:
    the prompt is ours. ``bench.best_aggregator`` measures who aggregates best.
    """

    options: AggregateOptions = field(default_factory=AggregateOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return tuple(
            Ask(pick.expert, pick.draw, pick.weight, temperature=self.options.temperature)
            for pick in picks_of(question)
        )

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        reason = {"kind": "aggregate", "aggregator": aggregator_of(question, self.options)}
        answers = by_rank(question, telling(said[0]))
        if len(said) > 1:
            return settle_last(said, [(0, one) for one in answers], reason)
        return ask_aggregator(question, self.options, answers) or unanswered(said, reason)

    def experts(self) -> frozenset[str]:
        return named(self.options.aggregator)


def aggregator_of(question: Question, options: AggregateOptions) -> str:
    """Who aggregates: the one named, else the primary."""
    return options.aggregator or ranked(question)[0]


def ask_aggregator(
    question: Question, options: AggregateOptions, answers: Sequence[Said], *, expert: str | None = None
) -> tuple[Ask, ...]:
    """The aggregator's one call, shown these answers; nothing without answers.

    Args:
        question: with its decision.
        options: name the aggregator and its temperature.
        answers: in the order in which they are shown.
        expert: the aggregator where the options name none; None: the primary.
    """
    if not answers:
        return ()
    return (
        Ask(
            options.aggregator or expert or ranked(question)[0],
            prompt=with_answers(question.prompt, [one.text for one in answers]),
            temperature=options.aggregator_temperature,
        ),
    )


def settle_last(
    said: Sequence[Sequence[Said]], others: Sequence[tuple[int, Said]], reason: Mapping[str, Any]
) -> Settled:
    """The last stage's answer stands; if it says nothing, the first of the others, ``(stage, answer)``."""
    last = telling(said[-1])
    if last:
        return settle(last[0], len(said) - 1, said, reason)
    if others:
        return settle(
            others[0][1], others[0][0], said, {**reason, "fallback": "the aggregator gave no answer"}
        )
    return unanswered(said, reason)
