"""What was measured, as data, and how it stands to the bars."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_support.cases import BARS, BOOKKEEPING, FLAT, Bars
from bench_support.measure import Ran

_VERSIONS = ("mixmerge", "numpy", "numba", "mergekit", "torch", "safetensors", "transformers")
_THREADS = re.compile(r"(OMP|MKL|OPENBLAS|NUMBA)_NUM_THREADS|GOMP_SPINCOUNT|KMP_BLOCKTIME")


@dataclass
class Runs:
    """Repeated runs of one thing; a median of none is None."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def add(self, ran: Ran) -> None:
        self.seconds.append(ran.seconds)
        self.cpu.append(ran.cpu)
        self.peaks.append(ran.peak)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def peak(self) -> int | None:
        return max(self.peaks) if self.peaks else None


@dataclass
class Result:
    """One method.

    Args:
        memory_bar: most bytes its process may hold.
        planning: seconds the engine's process took to make the plan, which its runs do not include.
        half_peak: peak memory of the whole process on a model of half the size.
        imported: packages a whole process loaded.
        mergekit_fault: why there is no figure of mergekit.
    """

    method: str
    input_bytes: int
    output_bytes: int
    memory_bar: int
    planning: float = 0.0
    copy: Runs = field(default_factory=Runs)
    engine: Runs = field(default_factory=Runs)
    process: Runs = field(default_factory=Runs)
    mergekit: Runs = field(default_factory=Runs)
    half_peak: int | None = None
    imported: list[str] = field(default_factory=list)
    mergekit_fault: str = ""

    @property
    def bars(self) -> Bars:
        return BARS[self.method]

    @property
    def of_copy(self) -> float | None:
        return ratio(self.engine.median, self.copy.median)

    @property
    def faster(self) -> float | None:
        return ratio(self.mergekit.median, self.process.median)


@dataclass
class Many:
    """The merge of very many small tensors: whole processes, and copies of the same bytes."""

    tensors: int
    memory_bar: int
    process: Runs = field(default_factory=Runs)
    copy: Runs = field(default_factory=Runs)

    @property
    def beyond(self) -> float | None:
        """Seconds a merge takes that a copy does not."""
        whole, copied = self.process.median, self.copy.median
        return None if whole is None or copied is None else whole - copied


@dataclass
class Report:
    """Everything of one run of the benchmark."""

    machine: dict[str, str]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    many: Many | None = None
    startup: dict[str, float] = field(default_factory=dict)  # command -> seconds
    reading: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # circumstances -> way -> bytes a second


@dataclass(frozen=True)
class Verdict:
    """A bar, the figure beside it, and whether it was met."""

    what: str
    bar: str
    figure: str
    met: bool


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def verdicts(report: Report) -> list[Verdict]:
    """Every bar for which there is a figure."""
    found = [verdict for result in report.results for verdict in _of_method(result)]
    torch = sorted(result.method for result in report.results if "torch" in result.imported)
    if any(result.imported for result in report.results):
        figure = f"{', '.join(torch)} load it" if torch else "no method loads it"
        found.append(Verdict("start-up", "a CPU merge imports no torch", figure, not torch))
    return found + (list(_of_many(report.many)) if report.many else [])


def _of_method(result: Result) -> Iterator[Verdict]:
    name, bars = result.method, result.bars
    if bars.copy is not None and (figure := result.of_copy) is not None:
        yield Verdict(f"{name}: engine", f"≤ {bars.copy:g} x copy", f"{figure:.2f} x", figure <= bars.copy)
    if bars.faster is not None and (figure := result.faster) is not None:
        bar = f"≥ {bars.faster:g} x faster than mergekit"
        yield Verdict(f"{name}: whole process", bar, f"{figure:.1f} x", figure >= bars.faster)
    if (peak := result.process.peak) is not None:
        bar = f"≤ {megabytes(result.memory_bar)}"
        yield Verdict(f"{name}: peak memory", bar, megabytes(peak), peak <= result.memory_bar)
        if (growth := ratio(peak, result.half_peak)) is not None:
            bar = f"≤ {FLAT:g} x the peak at half the size"
            yield Verdict(f"{name}: flat memory", bar, f"{growth:.2f} x", growth <= FLAT)


def _of_many(many: Many) -> Iterator[Verdict]:
    name = f"linear of {many.tensors:,} tensors"
    if (beyond := many.beyond) is not None:
        bar = f"< {BOOKKEEPING:g} s beyond the copy"
        yield Verdict(f"{name}: bookkeeping", bar, f"{beyond:.2f} s", beyond < BOOKKEEPING)
    if (peak := many.process.peak) is not None:
        bar = f"≤ {megabytes(many.memory_bar)}"
        yield Verdict(f"{name}: peak memory", bar, megabytes(peak), peak <= many.memory_bar)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def as_json(report: Report) -> dict[str, Any]:
    """All rounds, the medians and ratios made of them, and the bars."""
    made = asdict(report)
    for result, row in zip(report.results, made["results"], strict=True):
        for name in ("copy", "engine", "process", "mergekit"):
            row[name] |= _summed_up(getattr(result, name))
        row |= {"engine_of_copy": result.of_copy, "times_faster_than_mergekit": result.faster}
    if report.many:
        for name in ("copy", "process"):
            made["many"][name] |= _summed_up(getattr(report.many, name))
        made["many"]["seconds_beyond_copy"] = report.many.beyond
    return made | {"bars": [asdict(verdict) for verdict in verdicts(report)]}


def _summed_up(runs: Runs) -> dict[str, float | None]:
    return {"median": runs.median, "peak": runs.peak}


def describe_machine(work: Path) -> dict[str, str]:
    """What a reader has to know to compare figures."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = re.findall(r"^model name\s*: (.+)$", info, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _THREADS.fullmatch(name)]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": models[0] if models else platform.machine(),
        "cores": f"{len(os.sched_getaffinity(0))}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "file system": _file_system(work),
        "system": f"Linux {platform.release()}",
        "Python": platform.python_version(),
        "versions": ", ".join(_installed(_VERSIONS)),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "thread variables": " ".join(variables) or "none set",
    }


def _installed(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no {name}"


def _file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    inside = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(inside)[1] if inside else "unknown"
