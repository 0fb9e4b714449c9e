"""Time and memory of every merge method beside a plain copy of the same bytes and mergekit, in one run.

    python examples/bench_merge.py                                       # 350 M parameters, about half an hour
    python examples/bench_merge.py --no-mergekit                         # about ten minutes
    python examples/bench_merge.py --parameters 20M --rounds 1 --methods linear,ties    # does it run?

Checkpoints are made once and kept in the work folder; outputs are deleted as it goes. The folder needs room for
about nine models and mergekit for one in memory. Other load on the machine spoils the seconds, the ratios less.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml
from bench_support import checkpoints
from bench_support.cases import BARS, Case, case_of
from bench_support.checkpoints import Models, Size
from bench_support.measure import (
    Engine,
    Failed,
    Ran,
    copy_bytes,
    imported,
    run_process,
    warm,
)
from bench_support.reading import reading_rates
from bench_support.report import chart, markdown, show
from bench_support.results import Many, Report, Result, Runs, as_json, describe_machine


@dataclass(frozen=True)
class Bench:
    """Where and how to measure."""

    work: Path
    rounds: int
    mergekit_rounds: int
    threads: int | None

    @property
    def out(self) -> Path:
        return self.work / "out"

    def recipe(self, case: Case, name: str) -> Path:
        path = self.work / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(case.recipe, sort_keys=False), encoding="utf-8")
        return path

    def clear(self) -> None:
        """Delete outputs, and wait for the disk: what one run left unwritten must not slow the next."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        os.sync()

    def merge(self, case: Case, recipe: Path, *, tracing: bool = False) -> Ran:
        """A whole process of ours."""
        self.clear()
        out = self.out / "merged"
        traced = ("-X", "importtime") if tracing else ()
        threads = ("--threads", str(self.threads)) if self.threads else ()
        command = [
            sys.executable,
            *traced,
            "-m",
            "mixmerge",
            "merge",
            str(recipe),
            str(out),
            "--quiet",
            *threads,
        ]
        ran = run_process(command, cwd=self.work)
        _check(case, out)
        return ran

    def mergekit(self, case: Case, recipe: Path) -> Ran:
        """A whole process of mergekit's; our checkpoints have no tokenizer for it to copy."""
        self.clear()
        out = self.out / "merged"
        program = Path(sys.executable).with_name("mergekit-yaml")
        command = [str(program), str(recipe), str(out), "--no-copy-tokenizer", "--quiet"]
        # torch's threads that spin for work halve its speed where cores are shared.
        ran = run_process(command, cwd=self.work, env={"GOMP_SPINCOUNT": "0"})
        _check(case, out)
        return ran

    def engine(self, case: Case, engine: Engine) -> Ran:
        self.clear()
        out = self.out / "merged"
        ran = engine.merge(out)
        _check(case, out)
        return ran

    def copy(self, case: Case) -> Ran:
        self.clear()
        return copy_bytes(case.inputs, self.out / "copy", case.output_bytes)


def _check(case: Case, out: Path) -> None:
    """A merge that wrote less than all was no merge."""
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if written < case.data_bytes:
        raise Failed(f"{case.method}: {written:,} bytes written of {case.data_bytes:,}")


def measure_method(bench: Bench, case: Case, half: Case) -> Result:
    """Alternate copy, engine and process, each round from another start; mergekit ends its rounds."""
    result = Result(case.method, case.input_bytes, case.output_bytes, case.memory_bar)
    recipe = bench.recipe(case, case.method)
    with Engine(recipe, threads=bench.threads, cwd=bench.work) as engine:
        result.planning = engine.planning
        bench.engine(case, engine)
        bench.copy(case)
        # Behind a first merge, which compiles what this machine has not compiled yet.
        result.imported = sorted(imported(bench.merge(case, recipe, tracing=True).said))
        steps: list[tuple[Runs, Callable[[], Ran]]] = [
            (result.copy, lambda: bench.copy(case)),
            (result.engine, lambda: bench.engine(case, engine)),
            (result.process, lambda: bench.merge(case, recipe)),
        ]
        for number in range(bench.rounds):
            warm(case.inputs)
            for runs, step in steps[number % 3 :] + steps[: number % 3]:
                runs.add(step())
            if number < bench.mergekit_rounds and not result.mergekit_fault:
                try:
                    result.mergekit.add(bench.mergekit(case, recipe))
                except Failed as error:
                    result.mergekit_fault = str(error)
    # As often as the whole: which tensors are in flight together is chance, and the most of more runs is more.
    smaller = bench.recipe(half, f"{case.method}-half")
    result.half_peak = max(bench.merge(half, smaller).peak for _ in range(bench.rounds))
    bench.clear()
    return result


def measure_many(bench: Bench, models: Models) -> Many:
    """Very many small tensors: what a merge costs beyond the bytes."""
    case = case_of("linear", models)
    recipe = bench.recipe(case, "many")
    many = Many(len(models.size.tensors), case.memory_bar)
    bench.merge(case, recipe)
    for _ in range(bench.rounds):
        warm(case.inputs)
        many.copy.add(bench.copy(case))
        many.process.add(bench.merge(case, recipe))
    bench.clear()
    return many


def measure_beside(bench: Bench, report: Report, expert: Path) -> None:
    """Start-up, and ways to read a file."""
    commands = {"mixmerge --help": ["-m", "mixmerge", "--help"], "import torch": ["-c", "import torch"]}
    for name, arguments in commands.items():
        runs = Runs()
        for _ in range(bench.rounds + 1):
            runs.add(run_process([sys.executable, *arguments], cwd=bench.work))
        report.startup[name] = Runs(runs.seconds[1:]).median or 0.0
    report.reading = reading_rates(expert, rounds=bench.rounds)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _line(result: Result) -> str:
    seconds = {
        "copy": result.copy.median,
        "engine": result.engine.median,
        "process": result.process.median,
        "mergekit": result.mergekit.median,
    }
    return f"{result.method}: " + ", ".join(
        f"{name} {value:.2f} s" for name, value in seconds.items() if value
    )


def run(
    bench: Bench,
    methods: Sequence[str],
    size: Size,
    *,
    experts: int,
    dtype: str,
    tensors: int,
    json_file: Path,
) -> Report:
    """Measure everything; what is known so far is in the JSON file after every method."""
    bench.work.mkdir(parents=True, exist_ok=True)
    models = checkpoints.build(bench.work, size, dtype=dtype, experts=experts, note=_say)
    half = checkpoints.build(bench.work, size.halved(), dtype=dtype, experts=experts, note=_say)
    report = Report(
        describe_machine(bench.work),
        {
            "parameters": size.parameters,
            "half_parameters": size.halved().parameters,
            "tensors": len(size.tensors),
            "experts": experts,
            "dtype": dtype,
            "rounds": bench.rounds,
            "mergekit_rounds": bench.mergekit_rounds,
            "threads": bench.threads or "default",
        },
    )
    for method in methods:
        result = measure_method(bench, case_of(method, models), case_of(method, half))
        report.results.append(result)
        json_file.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
        _say(_line(result))
    if tensors:
        small = checkpoints.build(
            bench.work, checkpoints.of_tensors(tensors), dtype=dtype, experts=2, note=_say
        )
        report.many = measure_many(bench, small)
    measure_beside(bench, report, checkpoints.weights(models.experts[0]))
    report.machine["load after"] = f"{os.getloadavg()[0]:.1f}"  # ours included
    json_file.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    return report


def main(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints, outputs and reports.")] = Path("bench"),
    parameters: Annotated[str, typer.Option(help="Size of a model, such as 350M.")] = "350M",
    experts: Annotated[int, typer.Option(min=1, help="Experts beside the base.")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = ",".join(BARS),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; one more goes before.")] = 5,
    mergekit: Annotated[bool, typer.Option(help="Run mergekit too.")] = True,
    mergekit_rounds: Annotated[int, typer.Option(min=1, help="It takes minutes a round.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of mixmerge; default: its own choice.")] = None,
    tensors: Annotated[int, typer.Option(min=0, help="Tensors of the many-tensor case; 0: none.")] = 20_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Default: WORK/bench_merge.json.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Default: in WORK.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="PNG; default: in WORK.")] = None,
) -> None:
    """Benchmark merging: plain copy, mixmerge (engine alone, whole process) and mergekit, in one run."""
    began = time.perf_counter()
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in BARS]
    if unknown or not chosen:
        raise typer.BadParameter(f"{', '.join(unknown) or 'none'}: known are {', '.join(BARS)}")
    if dtype not in checkpoints.DTYPES:
        raise typer.BadParameter(f"{dtype}: known are {', '.join(checkpoints.DTYPES)}")
    try:
        size = checkpoints.of_parameters(checkpoints.parse_count(parameters))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if mergekit and importlib.util.find_spec("mergekit") is None:
        _say("mergekit is not installed, so it is left out: pip install 'mixmerge[mergekit]'")
        mergekit = False
    bench = Bench(work.resolve(), rounds, min(rounds, mergekit_rounds) if mergekit else 0, threads)
    given = ((json_file, "json"), (markdown_file, "md"), (plot_file, "png"))
    files = [path or work / f"bench_merge.{end}" for path, end in given]
    for path in files:
        if path.parent != work and not path.parent.is_dir():
            raise typer.BadParameter(f"{path}: there is no folder {path.parent}")
    try:
        report = run(
            bench, chosen, size, experts=experts, dtype=dtype, tensors=tensors, json_file=files[0].resolve()
        )
    except Failed as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from error
    finally:
        shutil.rmtree(bench.out, ignore_errors=True)
    with contextlib.suppress(ImportError):  # matplotlib is an extra
        chart(report, files[2])
    picture = files[2].name if files[2].exists() and files[1].parent == files[2].parent else None
    files[1].write_text(markdown(report, picture=picture), encoding="utf-8")
    show(report)
    _say(f"{', '.join(str(path) for path in files if path.exists())}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
