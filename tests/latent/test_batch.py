"""Jobs of interactions: each expert is loaded as rarely as can be, and what was lost is made again."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.aggregate import Ask, Question, Said, Settled
from mixmerge.aggregate.latent import LatentAnswer
from mixmerge.batch.job import Job
from mixmerge.batch.ordering import loads, ordered
from mixmerge.batch.placing import Device, place
from mixmerge.batch.plan import Group
from mixmerge.batch.records import Answer, Item
from mixmerge.batch.setup import Conditions, Defaults, Listed, Setup
from mixmerge.decision.policies import Policy
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.engines.base import Capability
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.records import Generation, Request
from mixmerge.experts import Expert, ExpertSet
from mixmerge.mixture import Mixture, MixtureSpec
from mixmerge.mixture.latent_setup import setup_of_latent

# --- the composition


def question(*picks: Pick, primary: str | None = None) -> Question:
    first = primary or picks[0].expert
    return Question("q", "what", Decision("q", picks, first, {}, "test", {}, "1"))


def test_peers_offer_what_the_primary_reads() -> None:
    asks = LatentAnswer().first(
        question(Pick("b", weight=1.0), Pick("a", weight=2.0), Pick("c"), primary="a")
    )
    assert asks == (
        Ask("b", offers=True),
        Ask("c", offers=True),
        Ask("a", reads=(("b", 0.25), ("c", 0.25))),
    )
    assert LatentAnswer(together=True).first(question(Pick("a"), Pick("b"))) == (
        Ask("a", reads=(("b", 0.5),)),
    )
    assert LatentAnswer().first(question(Pick("a"))) == (Ask("a"),)
    drawn = LatentAnswer().first(question(Pick("a", 0, 0.0), Pick("b", 0, 0.0), Pick("b", 1, 0.0)))
    assert drawn[-1].reads == (("b", 0.5),), "picks that weigh nothing count alike"


def test_the_primarys_answer_stands_and_its_fault_is_told() -> None:
    asked = question(Pick("a"), Pick("b"))
    offer, ask = LatentAnswer().first(asked)
    told = LatentAnswer().then(asked, [(Said(offer, "", fault="b is out of memory"), Said(ask, "yes"))])
    assert isinstance(told, Settled)
    assert (told.text, told.expert, told.source) == ("yes", "a", (0, "a", 0))
    assert told.reason == {"kind": "latent", "primary": "a", "gates": {"a": 0.5, "b": 0.5}}
    lost = LatentAnswer().then(
        asked, [(Said(offer, "", fault="b is out of memory"), Said(ask, "", fault="peer b offers nothing"))]
    )
    assert isinstance(lost, Settled)
    assert lost.fault is not None
    assert "b is out of memory" in lost.fault


# --- order


def group(unit: str, after: Sequence[str] = (), *, reads: bool = False, size: int = 1) -> Group:
    return Group(unit, (Expert(unit, unit),), (), size, 1, 1, False, reads, frozenset(after))


def relation(reads: Mapping[str, Sequence[str]]) -> list[Group]:
    """Groups of a job in which these units read those."""
    offered = sorted({peer for peers in reads.values() for peer in peers})
    return [group(unit) for unit in offered] + [
        group(unit, peers, reads=True) for unit, peers in reads.items()
    ]


def times(groups: Sequence[Group], memory: int = 1) -> Counter[str]:
    """How often each unit is loaded where so many fit."""
    units = [one.unit for one in ordered(groups, lambda one: 1.0)]
    found: Counter[str] = Counter()
    for at in range(len(units)):
        before = loads(units[:at], [1] * at, memory)
        found[units[at]] += loads(units[: at + 1], [1] * (at + 1), memory) - before
    return found


def test_a_chain_loads_each_once() -> None:
    chain = relation({"d": ["c"], "b": ["a"], "c": ["b", "a"]})
    shown = [(one.unit, one.reads) for one in ordered(chain, lambda one: 1.0)]
    assert shown == [("a", False), ("b", False), ("b", True), ("c", False), ("c", True), ("d", True)]
    assert set(times(chain).values()) == {1}


def test_a_circle_ends_with_what_it_goes_on_with() -> None:
    circle = relation({"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]})
    shown = [(one.unit, one.reads) for one in ordered(circle, lambda one: 1.0)]
    assert [reads for _, reads in shown] == [False] * 3 + [True] * 3
    assert shown[2][0] == shown[3][0]
    assert sorted(times(circle).values()) == [1, 2, 2]
    assert set(times(circle, memory=3).values()) == {1}, "all fit"
    assert sorted(times(circle, memory=2).values()) == [1, 1, 2]


@given(st.dictionaries(st.sampled_from("abcdef"), st.sets(st.sampled_from("abcdef"), max_size=4), max_size=6))
def test_who_reads_comes_after_who_offers(reads: dict[str, set[str]]) -> None:
    asked = {unit: sorted(peers - {unit}) for unit, peers in reads.items() if peers - {unit}}
    groups = relation(asked)
    found = ordered(groups, lambda one: 1.0)
    assert sorted((one.unit, one.reads) for one in found) == sorted((one.unit, one.reads) for one in groups)
    for at, one in enumerate(found):
        offered = {other.unit for other in found[:at] if not other.reads}
        assert one.after <= offered
    assert max(times(groups).values(), default=0) <= 2
    circular = any(one in _reached(asked, one) for one in asked)
    if not circular:
        assert max(times(groups).values(), default=0) <= 1


def _reached(reads: Mapping[str, Sequence[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(reads.get(start, ()))
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += reads.get(one, ())
    return found


def test_devices_keep_to_one_order() -> None:
    """So that none waits for what waits for it."""
    groups = relation({"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]})
    placed = place(groups, [Device("x", 10), Device("y", 10)])
    whole = [(one.unit, one.reads) for one in ordered(groups, lambda one: 1.0)]
    for one in placed:
        mine = [(each.unit, each.reads) for each in one.groups]
        assert [reads for _, reads in mine] == sorted(reads for _, reads in mine)
        assert set(mine) <= set(whole)


# --- jobs of real experts

PROMPTS = (
    "a b c",
    "one two three",
    "the quick brown fox",
    "x",
    "lazy dog, 1 + 2",
    "grün ok",
    "jumps over",
    "y z",
)


@pytest.fixture
def made(trio: Any) -> Callable[..., Setup]:
    """``made(route, mode=...)``: what answers a job; ``route`` says (primary, peers) of the place of a prompt."""

    def make(route: Callable[[int], tuple[str, str]], *, mode: str = "prompt", **options: Any) -> Setup:
        name = options.pop("name", f"{mode}-2")
        fitted = trio.fitted(name, mode=mode, **options)
        experts = {name: {"model": one["model"]} for name, one in fitted.experts.items()}
        spec = MixtureSpec.model_validate(
            {"experts": experts, "compose": {"kind": "latent", "options": {"folder": str(fitted.folder)}}}
        )
        found = setup_of_latent(Mixture(spec, None, Policy()), Defaults(max_new_tokens=6))

        def decide(queries: Sequence[Query]) -> list[Decision]:
            decided = []
            for one in queries:
                primary, peers = route(PROMPTS.index(one.text))
                picks = tuple(Pick(name, weight=2.0 - at) for at, name in enumerate(primary + peers))
                decided.append(Decision(one.id, picks, primary, {}, "test", {}, "1"))
            return decided

        return replace(found, route=decide)

    return make


def items(count: int = 8) -> tuple[Item, ...]:
    return tuple(Item(f"q{at}", text) for at, text in enumerate(PROMPTS[:count]))


def run(
    setup: Setup, work: Path, *, memory: int = 1 << 30, asked: Sequence[Item] = items(), **more: Any
) -> tuple[list[Answer], Any]:
    conditions = Conditions((Device("cpu", memory),), batch_tokens=400, **more)
    with Job(Listed(tuple(asked)), setup, work, conditions) as job:
        report = job.run()
        return list(job.answers()), report


def largest(setup: Setup) -> int:
    from mixmerge.batch.opening import size_of

    return max(size_of(unit) for unit in setup.experts.units().values())


def told(report: Any, setup: Setup) -> dict[str, int]:
    """Expert -> loads."""
    names = {unit: experts[0].name for unit, experts in setup.experts.units().items()}
    return {names[one.unit]: one.times for one in report.loads}


def acyclic(at: int) -> tuple[str, str]:
    return (("a", ""), ("b", "a"), ("c", "ab"), ("c", "b"))[at % 4]


def circular(at: int) -> tuple[str, str]:
    return (("a", "bc"), ("b", "ca"), ("c", "a"))[at % 3]


def test_experts_are_loaded_once_where_none_read_each_other(
    made: Callable[..., Setup], tmp_path: Path
) -> None:
    setup = made(acyclic)
    answers, report = run(setup, tmp_path, memory=largest(setup))
    assert [one.fault for one in answers] == [None] * 8
    assert told(report, setup) == {"a": 1, "b": 1, "c": 1}
    assert [one.expert for one in answers] == [acyclic(at)[0] for at in range(8)]
    assert answers[2].reason["gates"] == pytest.approx({"c": 2 / 3, "a": 1 / 3, "b": 0.0})


def test_experts_that_read_each_other_are_loaded_twice_at_most(
    made: Callable[..., Setup], tmp_path: Path
) -> None:
    setup = made(circular)
    tight, report = run(setup, tmp_path / "tight", memory=largest(setup))
    assert sorted(told(report, setup).values()) == [1, 2, 2]
    wide, all_fit = run(setup, tmp_path / "wide")
    assert set(told(all_fit, setup).values()) == {1}
    assert [one.text for one in tight] == [one.text for one in wide]
    assert report.naive_loads > 12


def test_answers_are_those_of_the_engine(made: Callable[..., Setup], tmp_path: Path, trio: Any) -> None:
    setup = made(circular)
    answers, _ = run(setup, tmp_path)
    for at, one in enumerate(answers):
        primary, peers = circular(at)
        weights = np.arange(2.0, 2.0 - 1 - len(peers), -1.0)
        reads = tuple((name, float(weights[1 + at] / weights.sum())) for at, name in enumerate(peers))
        engine = trio.fitted("prompt-2").engine(expert=primary)
        assert one.text == engine.generate([Request("r", PROMPTS[at], 6, reads=reads)])[0].text
        assert one.calls == 1 + len(peers)


def test_all_experts_together_are_loaded_once(made: Callable[..., Setup], tmp_path: Path) -> None:
    setup = made(circular, mode="chunked")
    answers, report = run(setup, tmp_path)
    assert [one.fault for one in answers] == [None] * 8
    assert [one.times for one in report.loads] == [1]
    assert {one.expert for one in answers} == {"a", "b", "c"}


def test_who_is_named_answers_alone(made: Callable[..., Setup], tmp_path: Path, trio: Any) -> None:
    for mode in ("prompt", "lockstep"):
        setup = made(circular, mode=mode)
        (answer,), _ = run(setup, tmp_path / mode, asked=[Item("q", PROMPTS[0], expert="b")])
        alone = trio.fitted("prompt-2").engine(expert="b").generate([Request("r", PROMPTS[0], 6)])[0]
        assert (answer.text, answer.calls, answer.expert) == (alone.text, 1, "b")


class Thinker(EchoEngine):
    """An engine without a model that offers and reads: whoever reads what is not there says so."""

    capabilities: ClassVar[frozenset[Capability]] = EchoEngine.capabilities | {"latents"}

    def __init__(self, model: str, *, store: str, name: str) -> None:
        super().__init__(name, delay=0.02)
        self.model, self.store = model, Path(store)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        found = super().generate(requests)
        for at, (asked, one) in enumerate(zip(requests, found, strict=True)):
            if asked.offers:
                self._path(self.model, asked).parent.mkdir(parents=True, exist_ok=True)
                self._path(self.model, asked).touch()
                found[at] = replace(one, text=self._path(self.model, asked).stem)
                continue
            heard = [peer for peer, _ in asked.reads if self._path(peer, asked).exists()]
            lost = [peer for peer, _ in asked.reads if peer not in heard]
            found[at] = replace(one, text=f"{self.model} heard {heard}, missed {lost}")
        return found

    def _path(self, name: str, asked: Request) -> Path:
        key = hashlib.sha256(f"{name} {asked.prompt!r}".encode()).hexdigest()
        return self.store / key[:2] / f"{key}.latents"


@given(st.lists(st.permutations("abcd"), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=12)
def test_devices_wait_for_each_other(picked: list[Sequence[str]], devices: int, room: int) -> None:
    """Whoever reads has all that its peers offer, on any number of devices; none is loaded there thrice."""
    experts = ExpertSet(tuple(Expert(name, name, engine=f"{__name__}:Thinker") for name in "abcd"))

    def route(queries: Sequence[Query]) -> list[Decision]:
        orders = [picked[int(one.text.split()[1])][: 2 + int(one.text.split()[1]) % 3] for one in queries]
        return [
            Decision(one.id, tuple(map(Pick, order)), order[0], {}, "test", {}, "1")
            for one, order in zip(queries, orders, strict=True)
        ]

    setup = Setup(experts, LatentAnswer(), route, False, Defaults(), "mixture")
    conditions = Conditions(tuple(Device(f"cpu:{at}", room) for at in range(devices)), batch_tokens=200)
    asked = tuple(Item(f"q{at}", f"say {at}") for at in range(len(picked)))
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as work,
        Job(Listed(asked), setup, Path(work), conditions) as job,
    ):
        patch.setattr("mixmerge.batch.job.size_of", lambda unit: 1)
        report = job.run()
        for order, one in zip(picked, job.answers(), strict=True):
            assert one.text.startswith(f"{order[0]} heard")
            assert one.text.endswith("missed []")
    assert all(one.times <= 2 for one in report.loads)


def test_a_peer_that_cannot_be_read_costs_who_reads_it(
    made: Callable[..., Setup], tmp_path: Path, trio: Any
) -> None:
    place = tmp_path / "b"
    shutil.copytree(trio.experts["b"], place)
    setup = made(circular, name="damaged", experts={**trio.experts, "b": place})
    (place / "model.safetensors").write_bytes(b"nothing")
    setup = replace(setup, identity="damaged")
    conditions = Conditions((Device("cpu", 1 << 30),), batch_tokens=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixmerge.batch.job.size_of", lambda unit: 1)
        with Job(Listed(items()), setup, tmp_path / "job", conditions) as job:
            job.run()
            answers = list(job.answers())
    for at, one in enumerate(answers):
        primary, peers = circular(at)
        if "b" in primary + peers:
            assert one.fault is not None
            assert "b: " in str(one.fault)
        else:
            assert one.fault is None
    assert {one.fault is None for one in answers} == {True, False}


def test_latents_that_are_lost_are_made_again(made: Callable[..., Setup], tmp_path: Path) -> None:
    """A job stopped after its peers, whose latents are then gone, answers as if nothing had been."""
    from mixmerge.errors import StoppedError

    setup = made(circular)
    wanted, _ = run(setup, tmp_path / "whole")
    for lost in (True, False):
        work = tmp_path / f"lost {lost}"
        conditions = Conditions((Device("cpu", largest(setup)),), batch_tokens=400)
        with Job(Listed(items()), setup, work, conditions) as job:
            offered: list[int] = []

            def tell(what: str, done: int, total: int, job: Job = job, seen: list[int] = offered) -> None:
                seen.append(done)
                if what.startswith("stage") and done > 9:
                    job.stop.set()

            job._tell = tell
            with pytest.raises(StoppedError):
                job.run()
        assert list((work / "latents").rglob("*.latents"))
        if lost:
            shutil.rmtree(work / "latents")
        answers, _ = run(setup, work, memory=largest(setup))
        assert [one.text for one in answers] == [one.text for one in wanted]
        with Job(Listed(items()), setup, work, conditions) as job:
            job.remove()
        assert not work.exists()
