"""Compositions that make one answer of many: what is shown to whom, and what stands when calls fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.aggregate.moa import Moa, SelfMoa
from mixmerge.aggregate.options import AggregateOptions, MoaOptions, SelfMoaOptions, SelfMoaSeqOptions
from mixmerge.aggregate.prompts import aggregation_prompt, as_text, with_answers
from mixmerge.aggregate.records import Ask, Prompt, Question
from mixmerge.aggregate.sequential import SelfMoaSeq
from mixmerge.aggregate.synthesis import Aggregate
from mixmerge.decision.records import Decision, Pick
from mixmerge.engines.records import Message

Asks, Runs = Callable[..., Question], Callable[..., Any]


def shown(ask: Ask) -> list[str]:
    """The answers in a prompt, in their order."""
    assert ask.prompt is not None
    return re.findall(r"### Answer \d+\n(.*)", as_text(ask.prompt))


# --- prompts


def test_prompts_by_hand() -> None:
    text = aggregation_prompt("What?", ["<think>x</think> a", "b"])
    assert text.endswith("### Answer 1\na\n\n### Answer 2\nb\n\n### Question\nWhat?\n\n### Your answer\n")
    assert with_answers("What?", ["a"]) == aggregation_prompt("What?", ["a"])
    system, user, reply = Message("system", "Be kind"), Message("user", "What?"), Message("assistant", "Well")
    chat = with_answers((system, user), ["a"])
    assert chat == (system, Message("user", aggregation_prompt("What?", ["a"])))
    longer = with_answers((user, reply), ["a"])
    assert longer[:2] == (user, reply)
    assert longer[2].role == "user"
    assert "a" in longer[2].content  # type: ignore[union-attr]
    assert as_text((user,)) == "What?"
    assert as_text((user, reply)) == "user: What?\nassistant: Well"


@given(
    st.lists(st.text("ab{}%\\", min_size=1, max_size=5).map("<<{}>>".format), max_size=6, unique=True),
    st.booleans(),
)
def test_every_answer_is_shown_once(answers: list[str], chat: bool) -> None:
    prompt: Prompt = (Message("user", "Q{0}?"),) if chat else "Q{0}?"
    made = as_text(with_answers(prompt, answers))
    assert [made.count(one) for one in answers] == [1] * len(answers)
    assert sorted(answers, key=made.index) == answers
    assert made.count("Q{0}?") == 1


# --- one aggregator


def test_an_aggregator_makes_one_answer(run: Runs) -> None:
    picks = (Pick("a", 0, 0.5), Pick("b", 0, 0.3), Pick("a", 1, 0.2))
    question = Question("q", "What?", Decision("q", picks, "a", {}, "sample", {}, ""))
    options = AggregateOptions(aggregator="z", temperature=0.7, aggregator_temperature=0.0)

    def reply(asked: Ask) -> str:
        return "done" if asked.expert == "z" else f"<think>no</think>{asked.expert}{asked.draw}"

    done = run(Aggregate(options), question, reply)
    assert done.asked == [[("a", 0), ("b", 0), ("a", 1)], [("z", 0)]]
    assert [one.ask.temperature for one in done.said[0]] == [0.7] * 3
    last = done.said[1][0].ask
    assert (shown(last), last.temperature) == (["a0", "b0", "a1"], 0.0)
    assert (done.settled.text, done.settled.source) == ("done", (1, "z", 0))
    assert done.settled.reason == {"kind": "aggregate", "aggregator": "z"}
    assert Aggregate(options).experts() == {"z"}


def test_failed_and_silent_answers_are_left_out(ask: Asks, run: Runs) -> None:
    answers = {"a": "<think>cut", "b": None, "c": "x", "d": "y", "z": "xy"}
    aggregate = Aggregate(AggregateOptions(aggregator="z"))
    done = run(aggregate, ask("a", "b", "c", "d"), answers)
    assert shown(done.said[1][0].ask) == ["x", "y"]
    assert [one["expert"] for one in done.settled.reason["failed"]] == ["b"]
    for silent in (None, "  "):
        fallback = run(aggregate, ask("a", "b", "c", "d"), {**answers, "z": silent}).settled
        assert (fallback.text, fallback.source) == ("x", (0, "c", 0))
        assert fallback.reason["fallback"] == "the aggregator gave no answer"
    lost = run(aggregate, ask("a", "b"), answers)
    assert lost.asked == [[("a", 0), ("b", 0)]], "there is nothing to aggregate"
    assert lost.settled.fault == "b: went away; a: said nothing"
    by_primary = run(Aggregate(), ask("c", "d"), answers)
    assert by_primary.asked[1] == [("c", 0)]


# --- layers


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_layers_see_the_layer_before(ask: Asks, run: Runs, layers: int) -> None:
    def reply(asked: Ask) -> str:
        depth = 0 if asked.prompt is None else int(shown(asked)[0][-1]) + 1
        return f"{asked.expert}{depth}"

    done = run(Moa(MoaOptions(layers=layers)), ask("b", "a", "c"), reply)
    assert sum(map(len, done.said)) == 3 * (layers - 1) + 1
    assert {one.ask.temperature for stage in done.said[:-1] for one in stage} == {0.7}
    for depth, stage in enumerate(done.said[1:]):
        assert all(shown(one.ask) == [f"b{depth}", f"a{depth}", f"c{depth}"] for one in stage)
    assert done.asked[-1] == [("b", 0)]
    assert done.settled.text == f"b{layers - 1}"


def test_named_proposers_and_aggregator(ask: Asks, run: Runs) -> None:
    moa = Moa(MoaOptions(proposers=("y", "x"), aggregator="z"))
    done = run(moa, ask("a"), {"x": "1", "y": "2", "z": "3"})
    assert done.asked == [[("y", 0), ("x", 0)], [("z", 0)]]
    assert shown(done.said[1][0].ask) == ["2", "1"]
    assert moa.experts() == {"x", "y", "z"}


def test_layers_with_failures(ask: Asks, run: Runs) -> None:
    moa = Moa(MoaOptions(layers=3))
    first_only = run(moa, ask("a", "b"), lambda one: one.expert if one.prompt is None else None)
    assert first_only.settled.text == "a"
    assert first_only.settled.source == (0, "a", 0)
    assert shown(first_only.said[2][0].ask) == ["a", "b"], "the second layer is passed over"
    lost = run(moa, ask("a", "b"), {"a": None, "b": None})
    assert len(lost.said) == 1
    assert lost.settled.fault == "a: went away; b: went away"


# --- samples of one expert


def test_samples_are_made_into_one(ask: Asks, run: Runs) -> None:
    def reply(asked: Ask) -> str | None:
        if asked.prompt is not None:
            return "all"
        return None if asked.draw == 1 else f"s{asked.draw}"

    done = run(SelfMoa(SelfMoaOptions(samples=4)), ask("a", "b"), reply)
    assert done.asked == [[("a", draw) for draw in range(4)], [("a", 0)]]
    assert shown(done.said[1][0].ask) == ["s0", "s2", "s3"]
    assert done.settled.text == "all"
    options = SelfMoaOptions(samples=2, expert="e", aggregator="z")
    assert [stage[0][0] for stage in run(SelfMoa(options), ask("a"), {"e": "1", "z": "2"}).asked] == [
        "e",
        "z",
    ]
    assert run(SelfMoa(), ask("a"), {"a": None}).settled.fault.count("went away") == 6


def test_windows_slide_by_hand(ask: Asks, run: Runs) -> None:
    def reply(asked: Ask) -> str:
        return f"s{asked.draw}" if asked.prompt is None else f"<think>.</think>made of {len(shown(asked))}"

    options = SelfMoaSeqOptions(samples=8, window=4, reserved=2)
    done = run(SelfMoaSeq(options), ask("a"), reply)
    made = "made of 4"
    assert [shown(stage[0].ask) for stage in done.said[1:]] == [
        ["s0", "s1", "s2", "s3"],
        [made, made, "s4", "s5"],
        [made, made, "s6", "s7"],
    ]
    assert done.settled.source == (3, "a", 0)
    assert done.settled.reason["windows"] == 3
    one = run(SelfMoaSeq(SelfMoaSeqOptions(samples=3)), ask("a"), reply)
    assert [len(stage) for stage in one.said] == [3, 1]


@settings(max_examples=60)
@given(st.data())
def test_every_sample_is_shown_once_in_windows_of_their_size(
    run: Runs, ask: Asks, data: st.DataObject
) -> None:
    window = data.draw(st.integers(2, 7))
    reserved = data.draw(st.integers(1, window - 1))
    samples = data.draw(st.integers(2, 20))
    broken = data.draw(st.sets(st.integers(0, samples - 1)))
    deaf = data.draw(st.sets(st.integers(1, 20)))
    calls: list[int] = []

    def reply(asked: Ask) -> str | None:
        if asked.prompt is None:
            return None if asked.draw in broken else f"s{asked.draw}"
        calls.append(0)
        assert len(shown(asked)) <= window
        return None if len(calls) in deaf else f"made {len(calls)}"

    options = SelfMoaSeqOptions(samples=samples, window=window, reserved=reserved)
    done = run(SelfMoaSeq(options), ask("a"), reply)
    seen = [one for stage in done.said[1:] for one in shown(stage[0].ask) if one.startswith("s")]
    assert seen == [f"s{draw}" for draw in range(samples) if draw not in broken]
    assert (done.settled.fault is None) == (len(broken) < samples)
    for stage in done.said[1:]:
        made = [one for one in shown(stage[0].ask) if one.startswith("made")]
        assert len(made) in (0, reserved)
        assert len(set(made)) <= 1
