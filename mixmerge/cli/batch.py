"""``mixmerge batch``."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mixmerge.cli.show import emit_json, size, step_progress, table

if TYPE_CHECKING:
    from mixmerge.batch.costs import Report
    from mixmerge.batch.setup import Conditions
    from mixmerge.errors import Fault
    from mixmerge.mixture import Mixture
    from mixmerge.mixture.batching import JobPlan

MixturePath = Annotated[
    Path,
    typer.Argument(metavar="MIXTURE", help="Its YAML, a fitted folder, or a hub id.", show_default=False),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id.", show_default=False),
]
TrustEndpoints = Annotated[
    bool,
    typer.Option(
        "--trust-endpoints", help="A mixture of the hub may send prompts and keys to the servers it names."
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="cpu, cuda:0, ...; several times for several.", show_default="cpu"),
]
Memory = Annotated[
    float | None,
    typer.Option("--memory", min=0.001, help="GB that experts may take on a device.", show_default=False),
]
Latents = Annotated[
    float | None,
    typer.Option(
        "--latents",
        min=0.000001,
        help="GB of disk for what experts leave each other to read.",
        show_default="half of what is free",
    ),
]
BatchTokens = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="Of a batch: prompts and what may be generated.")
]
Apart = Annotated[
    bool, typer.Option("--apart", help="Experts run in processes of their own, on the CPU too.")
]
Deadline = Annotated[
    float | None, typer.Option(help="Seconds after which no batch is started.", show_default=False)
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Run on a Ray cluster: auto or host:port; with no address one is started here.",
        show_default=False,
    ),
]
RayCpus = Annotated[
    int, typer.Option("--ray-cpus", min=1, help="CPUs of a slot, where the cluster has no GPUs.")
]


class WithRay(TyperCommand):
    """A command whose ``--ray`` may stand without an address, which Typer has no word for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_address(args))


def with_address(args: list[str]) -> list[str]:
    """The arguments, with ``local`` after a ``--ray`` that no address follows."""
    end = args.index("--") if "--" in args else len(args)
    made: list[str] = []
    for at, one in enumerate(args):
        made.append(one)
        if one == "--ray" and at < end and not _is_address("".join(args[at + 1 : at + 2])):
            made.append("local")
    return made


def _is_address(text: str) -> bool:
    """A word that Ray knows, or host:port; no option, and no file."""
    if text in ("auto", "local"):
        return True
    return ":" in text and not text.startswith("-") and not Path(text).exists()


def batch(
    mixture: MixturePath,
    input: Annotated[  # the option's name
        str,
        typer.Option("-i", "--input", help="Requests: OpenAI batch JSONL, JSONL, CSV, text; - for stdin."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Answers, in the input's format.", show_default=False),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="openai, jsonl, csv or text.", show_default=False)
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", help="JSON field or CSV column of the text.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="body.model of requests that are routed.")] = "mixmerge",
    plan: Annotated[bool, typer.Option("--plan", help="Print what would run where, and stop.")] = False,
    unordered: Annotated[bool, typer.Option("--unordered", help="Write answers as they come.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Write decisions and reasons too.")] = False,
    device: Devices = None,
    memory: Memory = None,
    latents: Latents = None,
    batch_tokens: BatchTokens = 8192,
    deadline: Deadline = None,
    apart: Apart = False,
    ray: Ray = None,
    ray_cpus: RayCpus = 4,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, and start again.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    revision: Revision = None,
    trust_endpoints: TrustEndpoints = False,
) -> None:
    """Answer a file of requests: each expert is loaded once, and nothing is lost.

    Routes every request, groups them by what has to be loaded, generates,
    composes, and writes one answer for each line. A run that was killed,
    interrupted (exit code 130) or out of time (exit code 3) goes on when
    the same command is given again.
    """
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.mixture import Mixture, batching

    if output is None and not plan:
        raise MixmergeError(Fault("--output", "is missing", "A file, or --plan"))
    asked = batching.Files(
        Path(input),
        output or Path(input).with_suffix(".answers"),
        format=format,
        field=field,
        name=name,
        explain=explain,
        unordered=unordered,
        overwrite=overwrite,
    )
    conditions, loaded = _ready(
        lambda: conditions_of(device, memory, batch_tokens, deadline, apart=apart, ray=ray, latents=latents),
        lambda: Mixture.load(mixture, revision=revision, trust_endpoints=trust_endpoints, answers=True),
        lambda: batching.check_files(asked, read=input != "-", written=not plan),
    )
    with (
        _file(input, None if plan else output) as path,
        on_cluster(conditions, ray, ray_cpus, memory) as conditions,
    ):
        files = replace(asked, input=path, output=output or path.with_suffix(".answers"))
        if plan:
            planned = batching.plan(loaded, files, conditions)
            emit_json(planned.as_dict()) if json else show_plan(planned)
            return
        with step_progress(quiet=quiet) as progress:
            done = batching.run(loaded, files, conditions, progress=progress)
    if json:
        emit_json({"output": str(done.output), **done.report.as_dict()})
        return
    print(done.output)
    show_report(done.report)


def _ready(
    conditions: Callable[[], Conditions], mixture: Callable[[], Mixture], files: Callable[[], None]
) -> tuple[Conditions, Mixture]:
    """Where a job runs and what answers it, with the faults of both and of its files at once."""
    from mixmerge.errors import MixmergeError, collecting

    faults: list[Fault] = []
    told: Conditions | None = None
    loaded: Mixture | None = None
    with collecting(faults):
        told = conditions()
    with collecting(faults):
        loaded = mixture()
    with collecting(faults):
        files()
    if told is None or loaded is None or faults:
        raise MixmergeError(faults)
    return told, loaded


def conditions_of(
    devices: list[str] | None,
    memory: float | None,
    batch_tokens: int,
    deadline: float | None,
    *,
    apart: bool = False,
    ray: str | None = None,
    latents: float | None = None,
) -> Conditions:
    """Where a job runs, as options say it; with ``ray``, ``on_cluster`` has yet to put its slots in.

    Raises:
        MixmergeError: devices that are not there, or that go with no cluster.
    """
    from mixmerge.batch.setup import Conditions, devices_of
    from mixmerge.errors import Fault, MixmergeError

    if ray is not None and devices:
        raise MixmergeError(Fault("--device", "does not go with --ray: the cluster's slots are the devices"))
    given = None if memory is None else int(memory * 1e9)
    room = None if latents is None else max(1, int(latents * 1e9))
    return Conditions(
        devices_of(devices or ["cpu"], memory=given), batch_tokens, deadline, apart, latents=room
    )


@contextmanager
def on_cluster(
    conditions: Conditions, address: str | None, cpus: int, memory: float | None
) -> Iterator[Conditions]:
    """The conditions, on a cluster if there is to be one."""
    if address is None:
        yield conditions
        return
    from mixmerge.batch.cluster import Cluster

    given = None if memory is None else int(memory * 1e9)
    with Cluster.open(address, cpus=cpus, memory=given) as cluster:
        yield replace(conditions, devices=cluster.devices, cluster=cluster)


@contextmanager
def _file(source: str, output: Path | None) -> Iterator[Path]:
    """The input as a file: what comes on stdin is copied beside the output, by the hash of its content.

    So the same requests are the same file to a job that goes on, and others are not written over it.
    """
    if source != "-":
        yield Path(source)
        return
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield _copied(Path(folder), "requests")[0]
        return
    kept, new = _copied(output.absolute().parent, f".{output.name}")
    done = False
    try:
        yield kept
        done = True
    finally:
        if done or new:
            kept.unlink(missing_ok=True)


def _copied(folder: Path, name: str) -> tuple[Path, bool]:
    """The copy, and whether it was not there before."""
    from mixmerge.outcomes.whole import unwritable

    partial, digest = folder / f"{name}.{os.getpid()}.stdin", hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            while block := sys.stdin.buffer.read(1 << 20):
                digest.update(block)
                file.write(block)
        kept = folder / f"{name}.{digest.hexdigest()[:16]}.stdin"
        if new := not kept.exists():
            partial.replace(kept)
        return kept, new
    except OSError as error:
        raise unwritable(partial, error) from error
    finally:
        partial.unlink(missing_ok=True)


def show_plan(plan: JobPlan) -> None:
    """Groups by device, and what the naive order would cost."""
    rows = [
        (
            one.device,
            ", ".join(expert.name for expert in group.experts),
            f"{group.calls:,}",
            f"{len(group.batches):,}",
            size(group.bytes) if group.bytes else "-",
            f"{group.prompt:,}",
            f"{group.new:,}",
        )
        for one in plan.placements
        for group in one.groups
    ]
    columns = ("device", "experts", "answers", "batches", "weights", "prompt tokens", "new tokens, at most")
    table(f"{plan.requests:,} requests, {plan.calls:,} answers to make", columns, rows, text=(0, 1))
    if plan.answered:
        print(f"{plan.answered:,} of these answers are there from a run before")
    if plan.bad:
        print(f"{plan.bad:,} lines are no requests: each gets an error record")
    naive = f"{plan.naive_loads:,} loads, about {plan.naive_load_seconds:,.3g} s"
    print(f"{plan.loads:,} loads; answering one request after the other: {naive}")


def show_report(report: Report) -> None:
    """What the job took, expert by expert."""
    rows = [
        (
            one.expert,
            f"{one.answers:,}",
            f"{one.tokens_in:,}",
            f"{one.tokens_out:,}",
            f"{one.seconds:,.1f}",
            f"{one.rate:,.0f}",
            "-" if one.cost is None else f"${one.cost:.4g}",
        )
        for one in report.experts
    ]
    columns = ("expert", "answers", "tokens in", "tokens out", "seconds", "tokens/s", "cost")
    table(f"{report.answered:,} of {report.requests:,} requests answered", columns, rows)
    times = sum(one.times for one in report.loads)
    print(
        f"{times:,} loads in {report.load_seconds:,.1f} s; "
        f"one request after the other would take {report.naive_loads:,}"
    )
    if report.splits:
        print(f"{report.splits:,} batches were too large and were divided")
    if report.failed:
        print(f"{report.failed:,} requests have an error record", file=sys.stderr)
