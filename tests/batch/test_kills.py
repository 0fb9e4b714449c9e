"""Jobs that are killed again and again: what they write in the end is what they would have written."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def hits(
    commands: Any, arguments: list[object], *, journal: Path, kills: int, most: float, rng: random.Random
) -> list[int]:
    """Give one command until it ends by itself, killing it at random points; batches that had ended at each kill."""
    hit: list[int] = []
    while True:
        pid = commands.begin(*arguments)
        timer = None
        if len(hit) < kills:
            timer = threading.Timer(rng.uniform(0, most), os.kill, (pid, signal.SIGKILL))
            timer.start()
        ended = commands.end()
        if timer is not None:
            timer.cancel()
            timer.join()
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
def test_engines_of_models_killed_twenty_times(commands: Any, case: Make, family: Any) -> None:
    """Two at most in a job: a batch that loses its engine three times is divided, and then another batch."""
    asked = [{"id": f"r{i}", "text": f"{i} + {i % 7} is {'the fox ' * (i % 4)}"} for i in range(40)]
    expert = {"model": str(family("llama", dtype="float32").experts[0])}
    job = case({"a": expert}, asked, generate={"max_new_tokens": 40})
    hunted(commands, job, kills=20, each=2, seed=4)
