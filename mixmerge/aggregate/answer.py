"""The primary's answer; if there is none, that of the next expert who has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixmerge.aggregate.asking import given, picks_of, ranked, settle, unanswered
from mixmerge.aggregate.options import AnswerOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled


@dataclass(frozen=True)
class PrimaryAnswer(Composition):
    """One expert answers: the primary, or where its call fails the next of the picks, one after the other.

    The reason has ``fallback``: whose place the answer takes. Other draws of the picks are not made.
    """

    options: AnswerOptions = field(default_factory=AnswerOptions)

    def first(self, question: Question) -> tuple[Ask, ...]:
        return (_ask(question, 0),)

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        found = given(said[-1])
        if found:
            fallback = {"fallback": ranked(question)[0]} if len(said) > 1 else {}
            return settle(found[0], len(said) - 1, said, {"kind": "answer", **fallback})
        if len(said) < len(ranked(question)):
            return (_ask(question, len(said)),)
        return unanswered(said, {"kind": "answer"})


def _ask(question: Question, at: int) -> Ask:
    expert = ranked(question)[at]
    pick = next((one for one in picks_of(question) if one.expert == expert), None)
    return Ask(expert) if pick is None else Ask(expert, pick.draw, pick.weight)
