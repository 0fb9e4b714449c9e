"""Jobs from end to end, over engines that answer at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mixmerge.aggregate import Ask, Composition, Question, Said, Settled
from mixmerge.batch.job import Job
from mixmerge.batch.placing import Device
from mixmerge.batch.records import Answer, Item, Settings
from mixmerge.batch.setup import Conditions, Defaults, Listed, Setup
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.errors import MixmergeError, StoppedError
from mixmerge.experts import Expert, ExpertSet
from mixmerge.outcomes.table import Price

EXPERTS = ExpertSet(
    (
        Expert("a", "echo a", engine="echo", price=Price(1.0, 2.0)),
        Expert("b", "echo b", engine="echo", price=Price(10.0, 20.0)),
    )
)


class First(Composition):
    """The first pick's answer."""

    def first(self, question: Question) -> tuple[Ask, ...]:
        pick = question.decision.picks[0]
        return (Ask(pick.expert, pick.draw),)

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        (one,) = said[-1]
        source = None if one.fault else (len(said) - 1, one.ask.expert, one.ask.draw)
        return Settled(one.text, one.ask.expert, source, fault=one.fault)


class Twice(First):
    """What the first pick said is asked of expert b, if it has an even number of words."""

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        if len(said) == 2 or len(said[0][0].text.split()) % 2:
            return super().then(question, said)
        return (Ask("b", prompt=f"{said[0][0].text} again"),)


def route(queries: Sequence[Query]) -> list[Decision]:
    """To a or b by the length of the text; nobody for what says so."""
    made = []
    for query in queries:
        name = "ab"[len(query.text) % 2]
        picks = () if "nobody" in query.text else (Pick(name),)
        made.append(Decision(query.id, picks, name if picks else None, {}, "test", {"rule": "length"}, "1"))
    return made


def setup(composition: Composition | None = None, experts: ExpertSet = EXPERTS) -> Setup:
    return Setup(experts, composition or First(), route, False, Defaults(max_new_tokens=8), "mixture")


def items(count: int) -> list[Item]:
    return [Item(f"q{i}", "word " * (1 + i % 5) + "x" * (1 + i % 7)) for i in range(count)]


CPU = Conditions((Device("cpu", 1 << 30),), batch_tokens=100)


def run(asked: Sequence[Item], made: Setup, work: Path, conditions: Conditions = CPU) -> list[Answer]:
    with Job(Listed(tuple(asked)), made, work, conditions) as job:
        job.run()
        return list(job.answers())


def test_every_request_gets_its_answer_in_order(tmp_path: Path) -> None:
    asked = [*items(50), Item("named", "to whom", expert="b"), Item("none", "nobody")]
    found = run(asked, setup(), tmp_path)
    assert [one.id for one in found] == [one.id for one in asked]
    for item, answer in zip(asked[:51], found[:51], strict=True):
        assert answer.text == item.prompt
        assert answer.expert == (item.expert or "ab"[len(item.text) % 2])
        assert answer.fault is None
        assert answer.tokens_in == answer.tokens_out == len(str(item.prompt).split())
        rate = 3.0 if answer.expert == "a" else 30.0
        assert answer.cost == pytest.approx(rate * answer.tokens_in / 1e6)
    assert found[50].decision == {}
    assert found[0].decision["picks"][0]["expert"] == found[0].expert
    assert "abstains" in str(found[51].fault)


def test_later_stages_see_what_was_said(tmp_path: Path) -> None:
    asked = items(30)
    for item, answer in zip(asked, run(asked, setup(Twice()), tmp_path), strict=True):
        words = item.text.split()
        again = len(words) % 2 == 0
        assert answer.text.split() == ([*words, "again"][:8] if again else words)
        assert answer.calls == (2 if again else 1)


def test_a_job_goes_on_from_its_journal(tmp_path: Path) -> None:
    asked, whole = items(60), run(items(60), setup(Twice()), tmp_path / "whole")
    seen = 0
    job = Job(Listed(tuple(asked)), setup(Twice()), tmp_path / "cut", CPU)

    def count(answer: Answer) -> None:
        nonlocal seen
        seen += 1
        if seen == 20:
            job.stop.set()

    with job, pytest.raises(StoppedError, match="Run the same command"):
        job.run(settled=count)
    told: list[str] = []
    with Job(Listed(tuple(asked)), setup(Twice()), tmp_path / "cut", CPU) as again:
        report = again.run(settled=lambda one: told.append(one.id))
        assert list(again.answers()) == whole
    assert sorted(told) == sorted(one.id for one in asked)
    assert report.answered == 60
    assert sum(one.answers for one in report.experts) == sum(one.calls for one in whole)


def test_a_journal_of_another_job_is_refused(tmp_path: Path) -> None:
    run(items(3), setup(), tmp_path)
    other = replace(setup(), identity="another mixture")
    with pytest.raises(MixmergeError, match="another mixture"):
        run(items(3), other, tmp_path)


def test_an_expert_that_cannot_be_loaded_fails_alone(tmp_path: Path) -> None:
    broken = ExpertSet((EXPERTS["a"], Expert("b", str(tmp_path / "gone"))))
    found = run(items(20), setup(experts=broken), tmp_path / "work")
    assert {one.expert for one in found if one.fault is None} == {"a"}
    assert all("cannot load it" in str(one.fault) for one in found if one.fault is not None)
    assert {one.fault is None for one in found} == {True, False}


def test_requests_say_how_to_generate(tmp_path: Path) -> None:
    asked = [
        Item("short", "one two three", expert="a", settings=Settings(max_new_tokens=2)),
        Item("stop", "one two three", expert="a", settings=Settings(stop=("two",))),
        Item("logprobs", "one two", expert="a", settings=Settings(logprobs=True)),
    ]
    short, stop, logprobs = run(asked, setup(), tmp_path)
    assert (short.text, short.finish) == ("one two", "length")
    assert (stop.text, stop.finish) == ("one ", "stop")
    assert logprobs.logprobs is not None
    assert len(logprobs.logprobs) == 2


def test_a_deadline_ends_it(tmp_path: Path) -> None:
    soon = replace(CPU, deadline=1e-9)
    with Job(Listed(tuple(items(5))), setup(), tmp_path, soon) as job, pytest.raises(StoppedError):
        job.run()


def test_several_devices_share_the_work(tmp_path: Path) -> None:
    two = replace(CPU, devices=(Device("cpu", 1 << 30), Device("cpu:1", 1 << 30)))
    with Job(Listed(tuple(items(80))), setup(), tmp_path / "two", two) as job:
        report = job.run()
        assert list(job.answers()) == run(items(80), setup(), tmp_path / "one")
    assert {one.device for one in report.loads} == {"cpu", "cpu:1"}
    assert sum(one.times for one in report.loads) == 2


def test_batches_keep_to_the_memory_of_the_first_run(tmp_path: Path, hollow: Callable[..., Path]) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    folder = hollow("expert", {"w": ("F32", (1000,))}, **config, dtype="bfloat16")
    experts = ExpertSet((Expert("a", str(folder)), EXPERTS["b"]))
    room = (
        4_000 + 2 * 2 * 2 * 2 * 8 * 2 * 50
    )  # of the weights, and of keys and values of 100 tokens, half of which count
    for memory, tokens in ((room, 50), (1 << 40, 50)):
        conditions = replace(CPU, devices=(Device("cpu", memory),), batch_tokens=8192)
        with Job(Listed(tuple(items(2))), setup(experts=experts), tmp_path / "job", conditions) as job:
            assert job.budgets[experts["a"].unit] == tokens
            assert job.budgets[experts["b"].unit] == 8192
