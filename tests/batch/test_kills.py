"""Jobs that are killed again and again: what they write in the end is what they would have written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mixmerge.batch.journal import data_of

Make = Callable[..., Any]


def echo(name: str, delay: float) -> dict[str, Any]:
    return {"model": name, "engine": "echo", "options": {"delay": delay}}


def slow(case: Make, name: str, *, requests: int, delay: float) -> Any:
    """A job of two stages, in which two experts answer and one makes one answer of theirs."""
    asked = [{"id": f"r{i}", "text": f"say {'on ' * (i % 9)}{i}"} for i in range(requests)]
    return case(
        {one: echo(one, delay) for one in "abc"},
        asked,
        name=name,
        policy={"kind": "top_k", "k": 2},
        compose={"kind": "aggregate", "aggregator": "c"},
        generate={"max_new_tokens": 64},
    )


def kill_later(pid: int, journal: Path, seconds: float, grown: bool, over: threading.Event) -> None:
    """Kill so many seconds from now, or, if ``grown``, from the first line that the command writes down."""
    before = journal.stat().st_size if journal.exists() else 0
    while grown and (not journal.exists() or journal.stat().st_size == before):
        if over.wait(0.002):
            return
    if not over.wait(seconds):
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.kill(pid, signal.SIGKILL)


def hits(
    commands: Any, arguments: list[object], *, journal: Path, kills: int, most: float, rng: random.Random
) -> list[int]:
    """Give one command until it ends by itself, killing it at random points; batches that had ended at each kill.

    Every other kill is timed from the start, which on a busy machine may never get to the work, and every other
    one from the work's first progress.
    """
    hit: list[int] = []
    while True:
        over, killer = threading.Event(), None
        pid = commands.begin(*arguments)
        if len(hit) < kills:
            after = (rng.uniform(0, most), False) if len(hit) % 2 else (rng.uniform(0, most / 2), True)
            killer = threading.Thread(target=kill_later, args=(pid, journal, *after, over))
            killer.start()
        ended = commands.end()
        if killer is not None:
            over.set()
            killer.join()
        if ended.code == 0:
            return hit
        if ended.code == 2 and "exists already" in ended.err:  # killed after its very last line of work
            return hit
        assert ended.code == -signal.SIGKILL, ended
        hit.append(journal.read_bytes().count(b'"data": {"end"') if journal.exists() else 0)


def lines(path: Path, *, in_order: bool) -> list[bytes]:
    found = path.read_bytes().splitlines(keepends=True)
    return found if in_order else sorted(found)


def killed_jobs(
    commands: Any, case: Make, *, kills: int, requests: int, options: list[str], seed: int
) -> None:
    """Jobs of one kind until so many kills have hit them, each compared with one that ran undisturbed."""
    made, rng = slow(case, "slow", requests=requests, delay=0.03), random.Random(seed)
    whole = made.folder / "whole.jsonl"
    arguments: list[object] = ["batch", made.mixture, "-i", made.requests, "--batch-tokens", 200, *options]
    commands(*arguments, "-o", whole)
    wanted = lines(whole, in_order="--unordered" not in options)
    assert len(wanted) == requests
    hit, jobs = list[int](), 0
    while len(hit) < kills:
        jobs += 1
        out = made.folder / f"out{jobs}.jsonl"
        journal = made.folder / f".{out.name}.job" / "journal.jsonl"
        left = kills - len(hit)
        hit += hits(commands, [*arguments, "-o", out], journal=journal, kills=left, most=1.0, rng=rng)
        assert lines(out, in_order="--unordered" not in options) == wanted
        assert not (made.folder / f".{out.name}.job").exists()
    assert len(set(hit)) > kills // 3, f"the kills hit the same places: {hit}"
    there = {path.name for path in made.folder.iterdir()}
    assert there == {"mix.yaml", "outcomes.jsonl", "requests.jsonl", "whole.jsonl"} | {
        f"out{i + 1}.jsonl" for i in range(jobs)
    }
    print(f"{len(hit)} kills of {jobs} jobs {' '.join(options)}, after {hit} batches: outputs as undisturbed")


@pytest.mark.parametrize("options", [[], ["--unordered"]])
def test_a_killed_job_goes_on(commands: Any, case: Make, options: list[str]) -> None:
    killed_jobs(commands, case, kills=3, requests=40, options=options, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--unordered"], ["--explain"]])
def test_a_job_killed_twenty_times_goes_on(commands: Any, case: Make, options: list[str]) -> None:
    killed_jobs(commands, case, kills=20, requests=120, options=options, seed=2)


def test_a_kill_after_the_output_is_written(commands: Any, case: Make) -> None:
    """The journal is still there, and says that the output is its own."""
    made = slow(case, "late", requests=10, delay=0.0)
    out, work = made.folder / "out.jsonl", made.folder / ".out.jsonl.job"
    arguments = ["batch", made.mixture, "-i", made.requests, "-o", out]
    commands(*arguments, "--deadline", 1e-6, code=3)
    kept = {path.name: path.read_bytes() for path in work.iterdir()}
    report = commands(*arguments, "--json")
    content = out.read_bytes()
    work.mkdir()
    for name, data in kept.items():
        (work / name).write_bytes(data)
    assert "exists already" in commands(*arguments, code=2).err  # the job has not got to it
    assert out.read_bytes() == content
    assert '"naive_loads"' in report.out


@pytest.mark.parametrize("unordered", [False, True])
def test_a_kill_between_output_and_end(commands: Any, case: Make, unordered: bool) -> None:
    from mixmerge.batch.job import Job
    from mixmerge.batch.setup import Conditions
    from mixmerge.mixture import Mixture, batching

    made = slow(case, "between", requests=10, delay=0.0)
    out = made.folder / "out.jsonl"
    files = batching.Files(made.requests, out, unordered=unordered)
    mixture = Mixture.load(made.mixture)

    class Killed(BaseException):
        pass

    def killed(job: Job) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "remove", killed)
        with pytest.raises(Killed):
            batching.run(mixture, files, Conditions())
    content = out.read_bytes()
    assert files.work.exists()
    done = batching.run(mixture, files, Conditions())
    assert (out.read_bytes(), files.work.exists()) == (content, False)
    assert (done.report.requests, done.report.failed, done.report.answered) == (10, 0, 10)


# --- engines in processes


def workers(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(one) for one in task.read_text().split()]
    return found


class Hunter(threading.Thread):
    """Kills a command's engines at random points, until it has killed so many or the command ends."""

    def __init__(self, pid: int, kills: int, rng: random.Random, most: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.left, self.rng, self.most = pid, kills, rng, most
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while self.left and not self.over.wait(self.rng.uniform(0, self.most)):
            with contextlib.suppress(OSError):
                there = [one for one in workers(self.pid) if one not in self.killed]
                if there:
                    os.kill(there[-1], signal.SIGKILL)
                    self.killed.append(there[-1])
                    self.left -= 1


def hunted(commands: Any, job: Any, *, kills: int, each: int, seed: int, most: float | None = None) -> None:
    """Jobs whose engines run in processes of their own, which are killed, so many in each job."""
    rng = random.Random(seed)
    arguments: list[object] = ["batch", job.mixture, "-i", job.requests, "--apart", "--batch-tokens", 300]
    start = time.monotonic()
    commands(*arguments, "-o", job.folder / "whole.jsonl")
    took = time.monotonic() - start
    wanted = (job.folder / "whole.jsonl").read_bytes()
    assert wanted.count(b'"error": null') == len(wanted.splitlines()) > 0
    killed, jobs = 0, 0
    while killed < kills:
        jobs += 1
        out = job.folder / f"out{jobs}.jsonl"
        hunter = Hunter(
            commands.begin(*arguments, "-o", out),
            min(each, kills - killed),
            rng,
            took if most is None else most,
        )
        hunter.start()
        ended = commands.end()
        hunter.over.set()
        hunter.join()
        assert ended.code == 0, ended
        killed += len(hunter.killed)
        assert out.read_bytes() == wanted
    print(f"{killed} kills of engines in {jobs} jobs: each output as undisturbed")


def test_a_killed_engine_is_started_again(commands: Any, case: Make) -> None:
    asked = [{"id": f"r{i}", "text": f"{i} " * 40} for i in range(30)]
    expert = {"model": "m", "engine": "hungry", "options": {"delay": 0.1}}
    hunted(commands, case({"a": expert}, asked), kills=3, each=2, seed=3)


def test_an_engine_that_is_killed_while_it_loads(commands: Any, case: Make) -> None:
    """As soon as there is a process, twice: the third one loads."""
    expert = {"model": "m", "engine": "hungry", "options": {"delay": 0.5}}
    made = case({"a": expert}, [{"id": f"r{i}", "text": f"{i}"} for i in range(5)])
    hunted(commands, made, kills=2, each=2, seed=5, most=0.1)


@pytest.mark.slow
def test_engines_killed_twenty_times(commands: Any, case: Make) -> None:
    """Two at most in a job: a batch that loses its engine three times is divided, and then another batch."""
    expert = {"model": "m", "engine": "bound", "options": {"delay": 0.1}}
    asked = [{"id": f"r{i}", "text": f"say {'on ' * (i % 9)}{i}"} for i in range(40)]
    hunted(commands, case({"a": expert}, asked), kills=20, each=2, seed=4)


@pytest.mark.slow
def test_engines_of_models_that_are_killed(commands: Any, case: Make, family: Any) -> None:
    """The same with weights: six kills, as each engine takes seconds to start."""
    asked = [{"id": f"r{i}", "text": f"{i} + {i % 7} is {'the fox ' * (i % 4)}"} for i in range(40)]
    expert = {"model": str(family("llama", dtype="float32").experts[0])}
    job = case({"a": expert}, asked, generate={"max_new_tokens": 40})
    hunted(commands, job, kills=6, each=2, seed=4)


# --- workers of a Ray cluster


def ended(journal: Path) -> Counter[str]:
    """Batches that have ended, of each expert."""
    told = [data_of(line) for line in journal.read_bytes().splitlines(True)] if journal.exists() else []
    return Counter(str(one["unit"]) for one in told if one is not None and "end" in one)


@dataclass
class WorkerHunter:
    """Kills Ray workers that hold an expert, or are about to, at points of a job.

    Args:
        raylet: the process whose children they are.
        journal: of the job.
        batches: that each expert has in all.
        points: (batches that have ended, seconds after that) of each kill.
    """

    raylet: int
    journal: Path
    batches: Counter[str]
    points: list[tuple[int, float]]
    rng: random.Random
    seen: set[int] = field(default_factory=set)
    killed: list[Counter[str]] = field(default_factory=list)  # batches that had ended just after each kill

    def run(self, over: threading.Event) -> None:
        points = iter(self.points)
        point = next(points, None)
        while not over.wait(0.03):
            there, done = self._look(), ended(self.journal)
            if point is None or not there or done.total() < point[0] or not self._harmless(done):
                continue
            if over.wait(point[1]):
                break
            if there := self._look():
                with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
                    os.kill(self.rng.choice(there), signal.SIGKILL)
                    self.killed.append(ended(self.journal))  # read now: before, it could be long out of date
                    point = next(points, None)

    def _look(self) -> list[int]:
        there = [one for one in workers(self.raylet) if hosts_expert(one)]
        self.seen.update(there)
        return there

    def _harmless(self, done: Counter[str]) -> bool:
        """Whether no load or batch would lose its worker a third time, which would divide it.

        After two kills each expert must have ended two more batches, of which one may have been on its way.
        """
        if len(self.killed) < 2:
            return True
        then = self.killed[-2]
        return all(done[unit] >= min(then[unit] + 2, count) for unit, count in self.batches.items())


def hosts_expert(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Hosted")
    return False


def raylet_of(pid: int) -> int:
    """The process that starts the workers of a cluster on this machine, which that process has started."""
    (found,) = [one for one in workers(pid) if b"/raylet\0" in Path(f"/proc/{one}/cmdline").read_bytes()]
    return found


@pytest.mark.slow
def test_ray_workers_killed_twenty_times(session: Path, ray_commands: Any, case: Make) -> None:
    """Up to five kills in a job. One counts if another worker had to be started for it, as for none that is late."""
    import ray

    job = case(  # two models, so that the batches of each worker are told apart
        {one: {"model": one, "engine": "bound", "options": {"delay": 0.1}} for one in "ab"},
        [{"id": f"r{i}", "text": f"say {'on ' * (i % 9)}{i}"} for i in range(160)],
        policy={"kind": "sample", "draws": 1, "temperature": 10.0},
        generate={"max_new_tokens": 64},
    )
    arguments: list[object] = ["batch", job.mixture, "-i", job.requests, "--batch-tokens", 200]
    groups = json.loads(ray_commands(*arguments, "--plan", "--json").out)["groups"]
    batches = Counter({one["unit"]: one["batches"] for one in groups})
    assert len(batches) == 2
    assert min(batches.values()) > 10
    arguments += ["--ray", ray.get_runtime_context().gcs_address, "--ray-cpus", 1]
    kills, rng, raylet = 20, random.Random(6), raylet_of(os.getpid())

    def run(name: str, points: list[tuple[int, float]]) -> WorkerHunter:
        journal = job.folder / f".{name}.job" / "journal.jsonl"
        hunter, over = WorkerHunter(raylet, journal, batches, points, rng), threading.Event()
        hunting = threading.Thread(target=hunter.run, args=(over,))
        ray_commands.begin(*arguments, "-o", job.folder / name)
        hunting.start()
        ended = ray_commands.end()
        over.set()
        hunting.join()
        assert ended.code == 0, ended
        return hunter

    assert len(run("whole.jsonl", []).seen) == 2  # each expert is loaded once
    wanted = (job.folder / "whole.jsonl").read_bytes()
    assert wanted.count(b'"error": null') == len(wanted.splitlines()) == 160
    landed, late, hit, jobs = 0, 0, list[int](), 0
    while landed < kills:
        jobs += 1
        more = min(5, kills - landed) - 1
        points = [
            (after, rng.uniform(0, 0.2)) for after in sorted(rng.sample(range(1, batches.total()), more))
        ]
        hunter = run(f"out{jobs}.jsonl", [(0, rng.uniform(0, 1.5)), *points])
        found = (job.folder / f"out{jobs}.jsonl").read_bytes()
        assert [line for line in found.splitlines() if b'"error": null' not in line] == []
        assert found == wanted
        started = len(hunter.seen) - 2
        landed, late = landed + started, late + len(hunter.killed) - started
        hit += [done.total() for done in hunter.killed]
    assert len(set(hit)) > kills // 3, f"the kills hit the same places: {hit}"
    shown = f"{landed} kills of Ray workers in {jobs} jobs of {batches.total()} batches, after {hit}"
    print(f"{shown}: each output as undisturbed; {late} more kills were late")
