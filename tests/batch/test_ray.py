"""Jobs on a Ray cluster: real actors in real processes of this machine, some of which are killed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixmerge.batch import job as job_module
from mixmerge.batch.cluster import Cluster, bundles
from mixmerge.batch.opening import open_engine
from mixmerge.cli import app
from mixmerge.cli.batch import with_address
from mixmerge.engines.base import Engine
from mixmerge.engines.contract import check_engine
from mixmerge.engines.ray import RayEngine
from mixmerge.engines.records import Request
from mixmerge.errors import CheckpointError, DependencyError, EngineDiedError, MixmergeError
from mixmerge.experts import Expert

ROOT = Path(__file__).parent.parent.parent
STANDINS = ROOT / "tests" / "engines" / "standins"
MARK = "quincunx"  # a word of prompts that is nowhere else
CPUS = 1
LONG = 120.0  # seconds after which a test gives up; nothing waits for them


# --- without a cluster


def test_slots_by_hand() -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    eight, three, head, dead = node(CPU=8.0), node(CPU=3.0), node(memory=1e9), node(False, CPU=64.0)
    assert bundles([eight, three, head, dead], 4) == [{"CPU": 4}, {"CPU": 4}, {"CPU": 3}]
    assert bundles([node(CPU=9.0)], 4) == [{"CPU": 4}] * 2
    two, none = node(CPU=16.0, GPU=2.0), node(GPU=1.0)
    assert bundles([eight, two, none], 4) == [{"GPU": 1, "CPU": 4}] * 2 + [{"GPU": 1}]
    assert bundles([two], 32) == [{"GPU": 1, "CPU": 8}] * 2
    assert bundles([head, dead], 4) == []


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"ray: is not installed. Run: pip install 'mixmerge\[ray\]'"):
        Cluster.open()


def test_options_that_are_wrong() -> None:
    with pytest.raises(MixmergeError) as caught:
        Cluster.open("ray://head:10001", cpus=0, local_cpus=0, wait=0)
    assert [fault.where for fault in caught.value.faults] == ["--ray", "--ray-cpus", "local_cpus", "wait"]


@pytest.mark.parametrize("address", ["localhost:1", "localhost:port"])
def test_no_cluster_answers(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(MixmergeError, match=f"--ray: no cluster answers at {address}: .*ray start --head"):
        Cluster.open(address)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("mix --ray", "mix --ray local"),
        ("--ray mix.yaml -i in", "--ray local mix.yaml -i in"),
        ("mix --ray -i in", "mix --ray local -i in"),
        ("--ray auto mix", "--ray auto mix"),
        ("mix --ray head:6379 -q", "mix --ray head:6379 -q"),
        ("mix --ray=head:6379", "mix --ray=head:6379"),
        ("mix -- --ray", "mix -- --ray"),
    ],
)
def test_an_address_may_be_left_out(given: str, made: str) -> None:
    assert with_address(given.split()) == made.split()


# --- with one


@pytest.fixture
def cluster(session: Path) -> Iterator[Cluster]:
    with Cluster.open(cpus=CPUS) as made:
        yield made


def test_another_cluster_is_refused(session: Path) -> None:
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(MixmergeError, match=f"localhost:{port}: this process is in the cluster at "):
            Cluster.open(f"localhost:{port}")


def ask(engine: Engine, prompt: str) -> str:
    return engine.generate([Request("r", prompt)])[0].text


def killed(engine: RayEngine) -> int:
    """Its process, which is no more."""
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_slots_share_what_a_machine_has(cluster: Cluster) -> None:
    assert [slot.name for slot in cluster.slots] == ["ray:0", "ray:1"]
    assert {slot.cpus for slot in cluster.slots} == {1}
    assert {slot.machine for slot in cluster.slots} == {os.uname().nodename}
    assert not cluster.own
    for device in cluster.devices:
        assert 0 < device.memory < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    with pytest.raises(MixmergeError, match="no CPU or GPU that is free"):
        Cluster.open(cpus=CPUS, wait=0.2)
    with pytest.raises(MixmergeError, match="Known: ray:0, ray:1"):
        cluster.slot("ray:2")


def test_the_contract(cluster: Cluster) -> None:
    check_engine(lambda: RayEngine("echo", name="e", slot=cluster.slots[0]))


@pytest.mark.slow
def test_the_contract_with_a_model(cluster: Cluster, family: Callable[..., Any]) -> None:
    folder = str(family("llama", dtype="float32").base)
    check_engine(
        lambda: RayEngine(
            "transformers", {"model": folder}, name="tiny", slot=cluster.slots[1], folders=[folder]
        )
    )


def test_a_worker_that_is_killed_is_replaced(cluster: Cluster) -> None:
    engine = RayEngine("faulty:Faulty", name="f", slot=cluster.slots[0])
    assert ask(engine, "hello") == "hello"
    first = killed(engine)
    with pytest.raises(EngineDiedError, match="engine f: its Ray worker on ray:0 ended: "):
        ask(engine, "hello")
    assert not engine.loaded
    assert ask(engine, "again") == "again"
    assert engine.loaded
    assert engine.pid not in (None, first, os.getpid())
    with pytest.raises(EngineDiedError):
        ask(engine, "exit 3")
    assert ask(engine, "again") == "again"
    engine.unload()
    assert engine.pid is None
    assert engine.machine is None


def test_a_worker_that_hangs_is_killed(cluster: Cluster) -> None:
    engine = RayEngine("faulty:Faulty", name="f", slot=cluster.slots[0], timeout=1.0, grace=0.1)
    ask(engine, "hello")
    with pytest.raises(EngineDiedError, match="took longer than 1 s"):
        ask(engine, "sleep 60")
    assert ask(engine, "hello") == "hello"
    engine.unload()


def test_faults_there_are_faults_here(cluster: Cluster) -> None:
    slot = cluster.slots[0]
    broken = RayEngine("faulty:Faulty", {"broken": "is torn"}, name="f", slot=slot)
    with pytest.raises(CheckpointError, match=r"a: is torn\. fine ones\. mend it") as caught:
        broken.load()
    assert len(caught.value.faults) == 2
    broken.unload()
    away = RayEngine("echo", name="e", slot=slot, folders=["/no/such/folder", str(ROOT)])
    with pytest.raises(CheckpointError, match="/no/such/folder is not there on the cluster's machine") as at:
        away.load()
    assert len(at.value.faults) == 1
    assert "file system that they share" in str(at.value)


def test_folders_are_named_from_the_root(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    unit = [Expert("a", "model", adapter="adapter"), Expert("b", "model", adapter="org/name")]
    engine = open_engine(unit, device="ray:1", cluster=cluster)
    assert isinstance(engine, RayEngine)
    assert engine.slot is cluster.slots[1]
    assert engine.arguments == {
        "model": str(tmp_path / "model"),
        "adapters": {"a": str(tmp_path / "adapter"), "b": "org/name"},
        "device": "cpu",
    }
    assert engine.folders == (str(tmp_path / "adapter"), str(tmp_path / "model"))
    endpoint = Expert("c", "m", endpoint="http://localhost:1/v1", engine="openai")
    assert not isinstance(open_engine([endpoint], device="cpu", cluster=cluster), RayEngine)


# --- whole jobs


@pytest.fixture
def files(tmp_path: Path, family: Callable[..., Any]) -> tuple[Path, Path]:
    """A mixture of two tiny models, and 60 requests of it."""
    made = family("llama", dtype="float32")
    outcomes = tmp_path / "outcomes.jsonl"
    rows = [
        {"query": f"{word} {at}", "expert": name, "score": float(name == good)}
        for word, good in (("sum", "a"), ("verse", "b"))
        for at in range(6)
        for name in "ab"
    ]
    outcomes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = tmp_path / "mixture.json"
    mixture.write_text(
        json.dumps(
            {
                "experts": {
                    name: {"model": str(folder)} for name, folder in zip("ab", made.experts, strict=True)
                },
                "router": {"kind": "knn", "outcomes": str(outcomes), "options": {"k": 3}},
                "generate": {"max_new_tokens": 12, "temperature": 0.7, "seed": 3},
            }
        )
    )
    asked = tmp_path / "requests.jsonl"
    asked.write_text(
        "".join(
            json.dumps(
                {"id": f"q{at}", "prompt": f"{'sum' if at % 3 else 'verse'} {MARK} " + "one " * (at % 9)}
            )
            + "\n"
            for at in range(60)
        )
    )
    return mixture, asked


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_a_job_gives_the_same_bytes_there_though_workers_are_killed(
    session: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, asked = files
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    options = ("--batch-tokens", 150, "-q")
    invoke("batch", mixture, "-i", asked, "-o", here, *options)
    answers = [json.loads(line) for line in here.read_text().splitlines()]
    assert [one["id"] for one in answers] == [f"q{at}" for at in range(60)]
    assert {one["expert"] for one in answers} == {"a", "b"}
    assert all(one["answer"] and not one.get("error") for one in answers)

    engines: list[RayEngine] = []

    def opened(
        unit: Sequence[Expert],
        *,
        device: str,
        apart: bool,
        cluster: Cluster,
        latents: Path,
        latents_bytes: int | None,
    ) -> Engine:
        made = open_engine(
            unit, device=device, apart=apart, cluster=cluster, latents=latents, latents_bytes=latents_bytes
        )
        engines.extend([made] if isinstance(made, RayEngine) else [])
        return made

    journal, answered = tmp_path / ".there.jsonl.job" / "journal.jsonl", []

    def kill() -> None:
        """Kill every worker when the first batch is done."""
        end = time.monotonic() + LONG
        while time.monotonic() < end and not (journal.exists() and b'"end": ' in journal.read_bytes()):
            time.sleep(0.005)
        for one in [one for one in engines if one.pid is not None]:
            killed(one)
            answered.append(journal.read_bytes().count(b'"key": '))

    monkeypatch.setattr(job_module, "open_engine", opened)
    killer = threading.Thread(target=kill)
    killer.start()
    invoke("batch", mixture, "-i", asked, "-o", there, *options, "--ray", "--ray-cpus", CPUS)
    killer.join()
    assert there.read_bytes() == here.read_bytes()
    assert {one.slot.name for one in engines} == {"ray:0", "ray:1"}
    assert answered
    assert all(0 < count < 60 for count in answered), "in the middle of the job"

    said = [path for path in session.rglob("*") if path.is_file()]
    assert any(path.name.startswith("worker") for path in said)
    assert not [path for path in said if MARK.encode() in path.read_bytes()]


def test_profiles_are_the_same_there(session: Path, tmp_path: Path) -> None:
    tasks, mixture = tmp_path / "tasks.jsonl", tmp_path / "mixture.json"
    lines = [{"text": f"say {at}", "answer": f"say {at - at % 2}"} for at in range(12)]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    experts = {name: {"model": name, "engine": "echo"} for name in "ab"}
    router = {"kind": "knn", "outcomes": "later.jsonl"}
    mixture.write_text(json.dumps({"experts": experts, "router": router}))
    arguments = ("profile", mixture, "--tasks", tasks, "--json", "-q")
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    invoke(*arguments, "-o", here)
    said = invoke(*arguments, "-o", there, "--ray", "--ray-cpus", CPUS)
    assert there.read_bytes() == here.read_bytes()
    report = json.loads(said)
    assert report["score"] == {"a": 0.5, "b": 0.5}
    assert {one["device"] for one in report["loads"]} == {"ray:0", "ray:1"}
    mixed = [str(one) for one in (*arguments, "-o", tmp_path / "not.jsonl", "--ray", "--device", "cpu")]
    refused = CliRunner().invoke(app, mixed)
    assert (refused.exit_code, "--device: does not go with --ray" in refused.stderr) == (2, True)


LOST = """
import sys
from ray.cluster_utils import Cluster as Machines
from mixmerge.batch.cluster import Cluster
from mixmerge.engines.ray import RayEngine
from mixmerge.engines.records import Request
from mixmerge.errors import EngineDiedError, StoppedError

def says(engine):
    try:
        return engine.generate([Request("r", "hello")])[0].text
    except (EngineDiedError, StoppedError) as error:
        return type(error).__name__

ours = {"num_cpus": 1, "object_store_memory": 100_000_000}
head = {**ours, "include_dashboard": False}
machines = Machines(initialize_head=True, head_node_args=head)
second = machines.add_node(**ours)
with Cluster.open(machines.address, cpus=1) as cluster:
    assert cluster.own
    engines = [RayEngine("echo", name=one.name, slot=one, start_timeout=20.0) for one in cluster.slots]
    print(*map(says, engines))
    machines.remove_node(second)
    for _ in range(2):
        print(*sorted(map(says, engines)))
machines.shutdown()
"""


@pytest.mark.slow
def test_a_machine_that_is_lost_stops_the_job() -> None:
    """What it had at work is asked again; if no other machine takes it over, the job stops, to go on later."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="r")  # sockets need a short path
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_TMPDIR": folder,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOST],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["hello hello", "EngineDiedError hello", "StoppedError hello"]
