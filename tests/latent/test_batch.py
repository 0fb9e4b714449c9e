"""Jobs of interactions: each expert is loaded as rarely as can be, and what was lost is made again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mixmerge.aggregate import Ask, Question, Said, Settled
from mixmerge.aggregate.latent import LatentAnswer
from mixmerge.batch.job import Job
from mixmerge.batch.ordering import loads, ordered
from mixmerge.batch.placing import Device, place
from mixmerge.batch.plan import Group
from mixmerge.batch.records import Answer, Item
from mixmerge.batch.setup import Conditions, Defaults, Listed, Setup
from mixmerge.cli import app
from mixmerge.decision.policies import Policy
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.engines.base import Capability
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.records import Generation, Request
from mixmerge.errors import MixmergeError
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


def test_a_job_whose_latents_have_no_room_answers_all_the_same(
    made: Callable[..., Setup], tmp_path: Path
) -> None:
    setup = made(circular)
    wanted, wide = run(setup, tmp_path / "wide")
    answers, report = run(setup, tmp_path / "narrow", latents=1)
    assert [one.fault for one in answers] == [None] * 8
    assert [one.text for one in answers] == [one.text for one in wanted]
    assert (wide.splits, report.splits > 0) == (0, True)
    with pytest.raises(MixmergeError, match="latents: is 0 bytes"):
        Conditions(latents=0)


# --- commands


@pytest.fixture
def mixed(trio: Any, tmp_path: Path) -> Callable[..., Path]:
    """``mixed(mode, **route)``: the YAML of a fitted mixture, and twelve requests beside it."""

    def make(mode: str = "prompt", **route: Any) -> Path:
        told = {"kind": "learned", "k": 2, "hidden": [8], "features": 64, **route}
        fitted = trio.fitted(f"routed-{mode}", mode=mode, route=told)
        told_yaml = {
            "experts": {name: dict(one) for name, one in fitted.experts.items()},
            "compose": {"kind": "latent", "folder": str(fitted.folder)},
            "generate": {"max_new_tokens": 6},
        }
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump(told_yaml, sort_keys=False))
        lines = [{"id": f"q{at}", "prompt": text} for at, text in enumerate(PROMPTS)]
        lines += [{"id": "named", "prompt": PROMPTS[0], "model": "b"}]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        return tmp_path / "mix.yaml"

    return make


def command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.mark.parametrize("mode", ["prompt", "lockstep"])
def test_one_question(mixed: Callable[..., Path], mode: str) -> None:
    mixture = mixed(mode)
    shown = command("ask", mixture, "one two", "--explain")
    told = json.loads(command("ask", mixture, "one two", "--explain", "--json").stdout)
    assert shown.stdout.strip() == told["answer"].strip()
    primary = told["expert"]
    picks = told["decision"]["picks"]
    assert (len(picks), picks[0]["expert"]) == (2, primary)
    assert told["reason"]["gates"] == pytest.approx({one["expert"]: one["weight"] for one in picks})
    assert list(told["reason"]["weights"]["mean"]) == ["(nothing)", picks[1]["expert"]]
    assert f"answers and reads {picks[1]['expert']}" in shown.stderr
    assert "share of the attention" in shown.stderr
    alone = json.loads(command("ask", mixture, "one two", "--expert", "c", "--json").stdout)
    assert (alone["expert"], alone["calls"]) == ("c", 1)
    pieces = list(Mixture.load(mixture).stream("one two"))
    assert "".join(one.text for one in pieces) == told["answer"]
    assert len(pieces) > 2, "word by word"
    (answer,) = Mixture.load(mixture).answer(["one two"])
    assert answer.text == told["answer"]


def batched(mixture: Path, out: str, *more: object) -> list[Any]:
    return ["batch", mixture, "-i", mixture.parent / "in.jsonl", "-o", mixture.parent / out, *more]


def test_a_file_of_requests(mixed: Callable[..., Path]) -> None:
    mixture = mixed()
    planned = json.loads(command(*batched(mixture, "out.jsonl", "--plan", "--json")).stdout)
    report = json.loads(command(*batched(mixture, "out.jsonl", "--json", "--explain")).stdout)
    assert planned["loads"] == sum(one["times"] for one in report["loads"])
    assert planned["calls"] == sum(one["answers"] for one in report["experts"])
    found = [json.loads(line) for line in (mixture.parent / "out.jsonl").read_text().splitlines()]
    assert [one["error"] for one in found] == [None] * 9
    assert found[0]["reason"]["gates"]
    assert not (mixture.parent / ".out.jsonl.job").exists()
    one = json.loads(command("ask", mixture, PROMPTS[0], "--json").stdout)
    assert one["answer"] == found[0]["answer"]


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes(mixed: Callable[..., Path]) -> None:
    """Workers of a Ray cluster of this machine leave latents to each other, with room for all of them or hardly any."""
    pytest.importorskip("ray")
    mixture = mixed()
    more = ("--batch-tokens", 60)
    command(*batched(mixture, "here.jsonl", *more))
    wanted = (mixture.parent / "here.jsonl").read_bytes()
    for name, room in (("wide.jsonl", ()), ("narrow.jsonl", ("--latents", 1e-6))):
        given = batched(mixture, name, *more, *room, "--ray", "--ray-cpus", 1, "--json")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mixmerge", *map(str, given)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},
        )
        assert done.returncode == 0, done.stderr
        assert {one["device"] for one in json.loads(done.stdout)["loads"]} <= {"ray:0", "ray:1"}
        assert (mixture.parent / name).read_bytes() == wanted
        assert not (mixture.parent / f".{name}.job").exists()


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on(mixed: Callable[..., Path]) -> None:
    """After SIGKILL at its first, third, ... batch, with its latents there or lost, it writes the same."""
    mixture = mixed()
    more = ("--batch-tokens", 60, "--memory", 0.001)
    command(*batched(mixture, "whole.jsonl", *more))
    wanted = (mixture.parent / "whole.jsonl").read_bytes()
    hits = 0
    for at, batches in enumerate((1, 3, 5, 7)):
        name = f"out{at}.jsonl"
        work = mixture.parent / f".{name}.job"
        if killed(batched(mixture, name, *more), work / "journal.jsonl", batches):
            hits += 1
            if at % 2:
                shutil.rmtree(work / "latents", ignore_errors=True)
            command(*batched(mixture, name, *more))
        assert (mixture.parent / name).read_bytes() == wanted
        assert not work.exists()
    assert hits > 1, "the job was over before it could be killed"


def killed(arguments: Sequence[object], journal: Path, batches: int) -> bool:
    """Run a command in a process of its own, and kill it when so many batches have ended; False if it was over."""
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            CliRunner().invoke(app, [str(one) for one in arguments])
        finally:
            os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if journal.exists() and journal.read_bytes().count(b'"data": {"end"') >= batches:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)
    return False


def test_a_mixture_of_the_hub_stays_in_its_repository(
    mixed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    mixture = yaml.safe_load(mixed().read_text())
    repository = tmp_path / "hub" / "models--org--mix"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name, one in mixture["experts"].items():
        shutil.copytree(one["model"], folder / name)
        one["model"] = name
    for file in Path(mixture["compose"]["folder"]).iterdir():
        shutil.copy(file, folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = command("ask", tmp_path / "mix.yaml", "one two").stdout
    (folder / "mixture.yaml").write_text(
        yaml.safe_dump({**mixture, "compose": {"kind": "latent", "folder": "."}})
    )
    assert command("ask", "org/mix", "one two").stdout == here
    for outside in (str(tmp_path), "../../..", "~"):
        told = {**mixture, "compose": {"kind": "latent", "folder": outside}}
        (folder / "mixture.yaml").write_text(yaml.safe_dump(told))
        with pytest.raises(MixmergeError, match="repository"):
            Mixture.load("org/mix")


# --- memory

ONE_AT_A_TIME = """
from pathlib import Path
from mixmerge.engines.records import Request
from mixmerge.latent.engine import LatentEngine
folder, expert, reads = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
import transformers.models.llama.modeling_llama, safetensors.torch, transformers.models.auto.modeling_auto
engine = LatentEngine(folder, experts=json.loads(sys.argv[4]), expert=expert, dtype="bfloat16")
"""
ASKED = """
request = Request("r", "the quick brown fox jumps over", 8, reads=tuple(map(tuple, reads)))
text = engine.generate([request])[0].text
told = {"text": text}
"""


@pytest.mark.slow
def test_memory_is_that_of_the_largest_expert(
    trio: Any, tmp_path: Path, peak_of: Callable[..., dict[str, Any]]
) -> None:
    """Peers of 50 and 40 MB beside a primary of 5 MB: their sum is never there."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    experts = {}
    for name, width, layers in (("a", 256, 2), ("b", 512, 6), ("c", 768, 2)):
        config = LlamaConfig(
            vocab_size=512, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, intermediate_size=4 * width, max_position_embeddings=128,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(trio.experts["a"]).save_pretrained(tmp_path / name)
        experts[name] = tmp_path / name
    made = trio.fitted("sized", experts=experts)
    arguments = (str(made.folder), json.dumps({name: dict(one) for name, one in made.experts.items()}))
    sizes = {
        name: sum(file.stat().st_size for file in place.glob("*.safetensors")) // 2
        for name, place in experts.items()
    }

    def used(expert: str, reads: Any) -> int:
        found = peak_of(ONE_AT_A_TIME, ASKED, arguments[0], expert, json.dumps(reads), arguments[1])
        return int(found["peak"] - found["before"])

    largest = used("b", [])
    assert largest > sizes["b"] > 30_000_000
    reading = used("a", [("b", 0.3), ("c", 0.3)])
    assert reading < largest + 10_000_000
    assert sizes["c"] > 30_000_000, "another one beside the largest would have been seen"
