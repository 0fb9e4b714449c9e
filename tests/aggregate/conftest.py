"""A small driver that runs a composition to its end, and checks on the way what every composition keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mixmerge.aggregate.records import Ask, Composition, Prompt, Question, Said, Settled
from mixmerge.decision.records import Decision, Pick

Reply = Callable[[Ask], str | Said | None]  # None: the call fails
MOST = 60  # stages after which a composition is taken not to end


@dataclass(frozen=True)
class Run:
    """How a composition ended, and all that was said, stage by stage."""

    settled: Settled
    said: tuple[tuple[Said, ...], ...]

    @property
    def asked(self) -> list[list[tuple[str, int]]]:
        return [[(one.ask.expert, one.ask.draw) for one in stage] for stage in self.said]


def question_of(*picks: str | tuple[str, float] | Pick, prompt: Prompt = "what?") -> Question:
    """A question whose picks are names, names with weights, or picks."""
    made = tuple(
        one
        if isinstance(one, Pick)
        else Pick(*one[:1], weight=one[1])
        if isinstance(one, tuple)
        else Pick(one)
        for one in picks
    )
    primary = made[0].expert if made else None
    return Question("q", prompt, Decision("q", made, primary, {}, "top_k", {}, "0" * 12))


def _said(ask: Ask, reply: Reply) -> Said:
    given = reply(ask)
    if isinstance(given, Said):
        return given
    return Said(ask, "", fault="went away") if given is None else Said(ask, given)


def _run(composition: Composition, question: Question, reply: Reply | Mapping[str, str | None]) -> Run:
    answer = reply if callable(reply) else lambda ask: reply[ask.expert]
    said: list[tuple[Said, ...]] = []
    step: Sequence[Ask] | Settled = composition.first(question)
    assert composition.first(question) == step
    while not isinstance(step, Settled):
        assert step, "a stage asks somebody"
        assert len(said) < MOST
        assert len({(ask.expert, ask.draw) for ask in step}) == len(step), "nobody is asked the same twice"
        allowed = {pick.expert for pick in question.decision.picks} | composition.experts()
        assert {ask.expert for ask in step} <= allowed
        said.append(tuple(_said(ask, answer) for ask in step))
        step = composition.then(question, said)
        backwards = composition.then(question, [stage[::-1] for stage in said])
        assert backwards == step == composition.then(question, said), (
            "order does not matter, nor calling again"
        )
    if step.source is None:
        assert step.fault
        assert (step.text, step.expert) == ("", None)
    else:
        stage, expert, draw = step.source
        (one,) = [one for one in said[stage] if (one.ask.expert, one.ask.draw) == (expert, draw)]
        assert (step.text, step.expert, step.fault, one.fault) == (one.text, expert, None, None)
    return Run(step, tuple(said))


@pytest.fixture(scope="session")
def ask() -> Callable[..., Question]:
    """``ask("a", ("b", 2.0), prompt=...)``: a question that these were picked for, best first."""
    return question_of


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """``run(composition, question, reply)``: the ``Run``; ``reply`` is a function of an ask, or answers by expert."""
    return _run
