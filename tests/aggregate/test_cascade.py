"""Cascades at work: confidences by hand, fitted escalations of the routers, and what stands when calls fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.aggregate.cascade import Asked, ConfidenceCascade, Escalation, Ladder, Step
from mixmerge.aggregate.options import CascadeOptions
from mixmerge.aggregate.prompts import as_text
from mixmerge.aggregate.records import Ask, Question, Said
from mixmerge.aggregate.verification import verdict, verification_prompt, verified
from mixmerge.engines.records import Message
from mixmerge.errors import MixmergeError
from mixmerge.routers import cascade as routing
from mixmerge.routers.automix import fit_automix

Asks, Runs = Callable[..., Question], Callable[..., Any]


def sure_of(**sure: float | None) -> Callable[[Ask], Said]:
    """Each expert says its name, with that geometric mean of probabilities; None fails."""

    def reply(asked: Ask) -> Said:
        value = sure[asked.expert]
        if value is None:
            return Said(asked, "", fault="gone")
        return Said(asked, asked.expert, (math.log(value),) * 3 if asked.logprobs else None)

    return reply


def cascade(*experts: str, thresholds: tuple[float, ...], **options: Any) -> ConfidenceCascade:
    return ConfidenceCascade(CascadeOptions(experts=experts, thresholds=thresholds, **options))


# --- confidence of log-probabilities


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        (0.9, 0.1, "a"),
        (0.8, 0.1, "a"),
        (0.7, 0.6, "ab"),
        (0.7, 0.4, "abc"),
        (None, 0.6, "ab"),
        (0.1, None, "abc"),
    ],
)
def test_it_stops_when_confident(
    ask: Asks, run: Runs, first: float | None, second: float | None, asked: str
) -> None:
    made = cascade("a", "b", "c", thresholds=(0.8 - 1e-9, 0.5))
    done = run(made, ask("z"), sure_of(a=first, b=second, c=0.2))
    assert done.asked == [[(name, 0)] for name in asked]
    assert (done.settled.text, done.settled.source) == (asked[-1], (len(asked) - 1, asked[-1], 0))
    assert [one["expert"] for one in done.settled.reason["asked"]] == list(asked)
    assert [stage[0].ask.logprobs for stage in done.said] == [name != "c" for name in asked]
    if first is not None:
        assert done.settled.reason["asked"][0]["confidence"] == pytest.approx(first)
    assert made.experts() == {"a", "b", "c"}


def test_when_the_last_fails_the_latest_answer_stands(ask: Asks, run: Runs) -> None:
    made = cascade("a", "b", "c", thresholds=(0.8, 0.8))
    done = run(made, ask("z"), sure_of(a=0.5, b=None, c=None))
    assert (done.settled.text, done.settled.reason["fallback"]) == ("a", "c")
    assert done.settled.reason["asked"][1:] == [{"expert": name, "confidence": None} for name in "bc"]
    assert [one["expert"] for one in done.settled.reason["failed"]] == ["b", "c"]
    lost = run(made, ask("z"), sure_of(a=None, b=None, c=None)).settled
    assert lost.fault == "a: gone; b: gone; c: gone"


def test_an_engine_without_logprobs_is_never_confident(ask: Asks, run: Runs) -> None:
    assert run(cascade("a", "b", thresholds=(0.0,)), ask("z"), {"a": "x", "b": "y"}).settled.text == "y"


# --- agreement of samples


def test_agreement_of_samples(ask: Asks, run: Runs) -> None:
    texts = ["4", "it is 5", "5", "5.0", "no idea", None]

    def reply(asked: Ask) -> str | None:
        return texts[asked.draw] if asked.expert == "a" else "6"

    options = {"confidence": "agreement", "samples": 6, "extract": "number", "temperature": 0.3}
    stays = run(cascade("a", "b", thresholds=(0.6,), **options), ask("z"), reply)
    assert stays.asked == [[("a", draw) for draw in range(6)]]
    assert {one.ask.temperature for one in stays.said[0]} == {0.3}
    assert stays.settled.source == (0, "a", 1)
    assert stays.settled.reason["asked"] == [{"expert": "a", "confidence": 0.6}]
    goes = run(cascade("a", "b", thresholds=(0.61,), **options), ask("z"), reply)
    assert goes.asked[1:] == [[("b", 0)]]
    assert (goes.settled.text, goes.said[1][0].ask.temperature) == ("6", None)
    unread = run(cascade("a", "b", thresholds=(0.0,), **options), ask("z"), {"a": "hm", "b": None})
    assert unread.settled.text == "hm"


# --- verification by the expert itself


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Correct", True),
        (" Incorrect.\n\nQuestion: x\nVerdict: Correct", False),
        ("The answer is correct", True),
        ("That is not correct", False),
        ("It isn't quite right", False),
        ("wrong", False),
        ("<think>wrong</think>True", True),
        ("correct or incorrect", None),
        ("Maybe", None),
        ("", None),
    ],
)
def test_verdicts(text: str, wanted: bool | None) -> None:
    assert verdict(text) is wanted


def test_verification_prompts() -> None:
    text = verification_prompt("What is {x}?", "<think>hm</think> 5")
    assert isinstance(text, str)
    assert text.endswith("\n\nQuestion: What is {x}?\nAnswer: 5\nVerdict:")
    assert text.count("Verdict: Correct") == text.count("Verdict: Incorrect") == 2
    (turn,) = verification_prompt((Message("user", "What is {x}?"),), "5")
    assert (turn.role, turn.content) == ("user", text)  # type: ignore[union-attr]
    asked = Ask("a")
    votes = [
        Said(asked, "Correct"),
        Said(asked, "hm"),
        Said(asked, "", fault="gone"),
        Said(asked, "Incorrect"),
    ]
    assert verified(votes) == 0.5
    assert math.isnan(verified(votes[1:3]))


def test_an_expert_verifies_itself(ask: Asks, run: Runs) -> None:
    def reply(asked: Ask) -> str | None:
        if asked.prompt is None:
            return f"says {asked.expert}"
        assert f"Answer: says {asked.expert}\nVerdict:" in as_text(asked.prompt)
        assert asked.temperature == 0.7
        return ["Correct", "Correct", "Incorrect", None][asked.draw]

    options = {"confidence": "verification", "samples": 4}
    stays = run(cascade("a", "b", "c", thresholds=(0.6, 0.0), **options), ask("z"), reply)
    assert stays.asked == [[("a", 0)], [("a", draw) for draw in range(4)]]
    assert stays.settled.source == (0, "a", 0)
    assert stays.settled.reason["asked"][0]["confidence"] == pytest.approx(2 / 3)
    goes = run(cascade("a", "b", "c", thresholds=(0.7, 0.7), **options), ask("z"), reply)
    assert [stage[0][0] for stage in goes.asked] == ["a", "a", "b", "b", "c"], "the last is not verified"
    assert goes.settled.text == "says c"
    broken = run(
        cascade("a", "b", thresholds=(0.0,), **options),
        ask("z"),
        lambda asked: None if asked.expert == "a" and asked.prompt is None else "x",
    )
    assert [stage[0][0] for stage in broken.asked] == ["a", "b"], "there is nothing to verify"


# --- escalations of the routers


def test_fitted_cascades_of_the_routers_run(ask: Asks, run: Runs) -> None:
    fitted = routing.Cascade(("a", "b", "c"), (0.8, 0.5))
    same = ConfidenceCascade(escalation=fitted)
    for sure in ({"a": 0.9, "b": 0.1}, {"a": 0.7, "b": 0.6}, {"a": 0.1, "b": None}):
        reply, question = sure_of(**sure, c=0.5), ask("z")
        options = run(cascade("a", "b", "c", thresholds=(0.8, 0.5)), question, reply)
        assert run(same, question, reply) == options
    small = np.array([1.0, 0.0] * 20)
    automix = fit_automix(("a", "b"), small, np.ones(40), np.array([1.0, 0.0] * 20))
    made = ConfidenceCascade(CascadeOptions(confidence="verification", samples=2), automix)
    for word, last in (("Correct", "a"), ("Incorrect", "b"), ("hm", "b")):
        done = run(made, ask("z"), lambda asked, word=word: word if asked.prompt else asked.expert)
        assert done.settled.expert == last


@given(
    st.lists(st.one_of(st.none(), st.floats(0.01, 1)), min_size=4, max_size=4),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_ladders_are_the_routers_cascades(sure: list[float | None], thresholds: list[float]) -> None:
    names = ("a", "b", "c", "d")
    ours: Escalation = Ladder(names, tuple(thresholds))
    theirs: Escalation = routing.Cascade(names, tuple(thresholds))
    for end in range(4):
        values = [math.nan if one is None else one for one in sure[:end]]
        history = [Asked(name, value) for name, value in zip(names, values, strict=False)]
        step, other = ours.next_step(history), theirs.next_step(history)
        assert (step.action, step.expert) == (other.action, other.expert)


def test_an_escalation_that_goes_round(ask: Asks) -> None:
    class Round:
        experts = ("a", "b")

        def next_step(self, history: Any) -> Step:
            return Step("escalate", "a")

    made = ConfidenceCascade(escalation=Round())
    (asked,) = made.first(ask("z"))
    with pytest.raises(MixmergeError, match="escalates to a, which has answered already"):
        made.then(ask("z"), [[Said(asked, "x")]])


def test_experts_or_an_escalation() -> None:
    with pytest.raises(MixmergeError, match=r"compose\.experts: are not given"):
        ConfidenceCascade()
    with pytest.raises(MixmergeError, match="are given beside a fitted escalation"):
        ConfidenceCascade(CascadeOptions(experts=("a",)), routing.Cascade(("a",), ()))
