"""``mixmerge profile``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.batch import (
    BatchTokens,
    Deadline,
    Devices,
    Memory,
    MixturePath,
    Ray,
    RayCpus,
    Revision,
    TrustEndpoints,
    conditions_of,
    on_cluster,
    show_report,
)
from mixmerge.cli.show import emit_json, step_progress, table

if TYPE_CHECKING:
    from mixmerge.mixture.profiling import Profile

Aggregators = Annotated[
    bool,
    typer.Option(
        "--aggregators", help="Measure too who makes the best one answer of a right and two wrong ones."
    ),
]


def profile(
    mixture: MixturePath,
    tasks: Annotated[
        Path,
        typer.Option("--tasks", help="JSONL or CSV: a text and its answer on each line.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Outcomes: .parquet or .jsonl.", show_default=False)
    ],
    check: Annotated[
        str,
        typer.Option(
            "--check", help="What has to be the same: exact, first_line, number, choice, json:PATH, whole."
        ),
    ] = "exact",
    reference: Annotated[str, typer.Option("--reference", help="Field of the right answer.")] = "answer",
    field: Annotated[
        str | None, typer.Option("--field", help="Field of the text.", show_default=False)
    ] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Answers of each expert to a query.")] = 1,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Of the answers.", show_default=False)
    ] = None,
    aggregators: Aggregators = False,
    device: Devices = None,
    memory: Memory = None,
    batch_tokens: BatchTokens = 8192,
    deadline: Deadline = None,
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
    """Run every expert over labelled queries, and write who was right: what routers are fitted on.

    The router of the mixture need not be there yet. A run that was killed
    goes on when the same command is given again.
    """
    from mixmerge.batch.journal import remove
    from mixmerge.mixture.hub import spec_from
    from mixmerge.mixture.profiling import bench_folder, same
    from mixmerge.mixture.profiling import profile as run
    from mixmerge.outcomes.whole import check_free
    from mixmerge.outcomes.writing import check_ending

    conditions = conditions_of(device, memory, batch_tokens, deadline, ray=ray)
    compared = same(check)
    check_ending(output)
    check_free(output, overwrite=overwrite)
    spec = spec_from(mixture, revision=revision, trust_endpoints=trust_endpoints)
    work = output.absolute().parent / f".{output.name}.job"
    for folder in (work, bench_folder(work)) if overwrite else ():
        remove(folder)
    with (
        on_cluster(conditions, ray, ray_cpus, memory) as conditions,
        step_progress(quiet=quiet) as progress,
    ):
        made = run(
            spec,
            tasks,
            work,
            check=compared,
            conditions=conditions,
            reference=reference,
            draws=draws,
            temperature=temperature,
            field=field,
            aggregators=aggregators,
            progress=progress,
        )
    made.outcomes.write(output)
    for folder in (work, bench_folder(work)):
        remove(folder)
    _show(made, output, json=json)


def _show(made: Profile, output: Path, *, json: bool) -> None:
    """What every expert scored, what it took, and who aggregates best, if that was asked."""
    import numpy as np

    told = made.aggregators
    score = made.outcomes.score
    means = {name: float(np.nanmean(score[:, e])) for e, name in enumerate(made.outcomes.experts)}
    if json:
        more = {} if told is None else {"aggregators": dataclasses.asdict(told)}
        emit_json({"output": str(output), "score": means, **more, **made.report.as_dict()})
        return
    print(output)
    rows = [(name, f"{value:.3f}") for name, value in means.items()]
    table(f"{len(made.outcomes):,} queries", ("expert", "mean score"), rows)
    if told is not None:
        found = [(name, f"{share:.3f}", f"{told.error[name]:.3f}") for name, share in told.accuracy.items()]
        table(f"{told.trials} trials of aggregating", ("expert", "right", "standard error"), found)
        print(f"best aggregator: {told.best}; compose: {{kind: aggregate, aggregator: {told.best}}}")
    show_report(made.report)
