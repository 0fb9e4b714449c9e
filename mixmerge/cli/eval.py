"""``mixmerge eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.show import emit_json, step_progress, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mixmerge.engines.loading import Dtype
    from mixmerge.evaluate.model_records import ModelReport
    from mixmerge.evaluate.task_file import EvalTask


Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="What is judged: folders, hub ids, BASE+ADAPTER, mixtures that answer as one; NAME=MODEL names one.",
        show_default=False,
    ),
]
Tasks = Annotated[
    Path | None, typer.Option(metavar="TASKS.yaml", help="Tasks: data and metrics.", show_default=False)
]
Task = Annotated[
    str | None, typer.Option(metavar="DATA", help="One task's rows, with --metric.", show_default=False)
]
Metric = Annotated[
    str | None,
    typer.Option(help="exact, f1, rouge1, rouge2, rougeL, choice, pass@1 or accuracy.", show_default=False),
]
Own = Annotated[str | None, typer.Option(help="Of --task: which expert is its own.", show_default=False)]
Head = Annotated[
    str | None, typer.Option(help="Of --task with accuracy: whose head classifies.", show_default=False)
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MODEL", help="What was merged; several times, or with commas.", show_default=False
    ),
]
Base = Annotated[str | None, typer.Option(help="What the experts are fine-tuned from.", show_default=False)]
Transductive = Annotated[
    bool, typer.Option("--transductive", help="Score rows that a merge has used; the report says so.")
]
Recommend = Annotated[
    bool, typer.Option("--recommend", help="Say which method to try next, and why; needs experts and base.")
]
Calibration = Annotated[
    str | None, typer.Option(help="For --recommend: data you could calibrate on.", show_default=False)
]
LmEval = Annotated[
    str | None,
    typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas.", show_default=False),
]
LmEvalPath = Annotated[
    Path | None, typer.Option(help="Folder with tasks of your own for it.", show_default=False)
]
TaskId = Annotated[
    bool, typer.Option("--task-id", help="Tell networks with a gate whose a task is: that expert answers.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Rows of each task, the first ones.", show_default=False)
]
Seed = Annotated[int, typer.Option(min=0, help="Of the intervals.")]
Resamples = Annotated[int, typer.Option(help="Of the intervals.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DtypeName = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a batch.")]
ProgramSeconds = Annotated[float, typer.Option(help="Of pass@1: what a program may take.")]
ProgramMemory = Annotated[int, typer.Option(help="The same in MiB.")]
Html = Annotated[Path | None, typer.Option(help="Write the report here.", show_default=False)]
Answers = Annotated[
    Path | None, typer.Option(help="Write every answer and score here: JSONL.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace these files.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]


def evaluate(
    models: Models,
    tasks: Tasks = None,
    task: Task = None,
    metric: Metric = None,
    own: Own = None,
    head: Head = None,
    experts: Experts = None,
    base: Base = None,
    transductive: Transductive = False,
    recommend: Recommend = False,
    calibration: Calibration = None,
    lm_eval: LmEval = None,
    lm_eval_path: LmEvalPath = None,
    task_id: TaskId = False,
    limit: Limit = None,
    seed: Seed = 0,
    resamples: Resamples = 2000,
    device: Device = "cpu",
    dtype: DtypeName = "auto",
    batch_tokens: BatchTokens = 8192,
    program_seconds: ProgramSeconds = 10.0,
    program_memory: ProgramMemory = 1024,
    html: Html = None,
    answers: Answers = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask models the questions of tasks: scores, and what is retained of the experts they were made of."""
    from mixmerge.evaluate.drawing import check_plots
    from mixmerge.evaluate.models import evaluate_models
    from mixmerge.evaluate.sandbox import Limits
    from mixmerge.outcomes.whole import check_free

    for path in (html, answers):
        if path is not None:
            check_free(path, overwrite=overwrite)
    if html is not None:
        check_plots()
    harness = _listed([lm_eval] if lm_eval is not None else [])
    read = _tasks(tasks, task, metric, own=own, head=head, needed=not harness)
    limits = Limits(seconds=program_seconds, memory=program_memory << 20)
    with step_progress(quiet=quiet) as progress:
        report = evaluate_models(
            _named(models, where="MODEL"),
            tasks=read,
            experts=_named(_listed(experts), where="--experts"),
            base=base,
            transductive=transductive,
            limit=limit,
            seed=seed,
            resamples=resamples,
            dtype=_dtype(dtype),
            device=device,
            batch_tokens=batch_tokens,
            limits=limits,
            recommend=recommend,
            calibration=calibration,
            lm_eval=harness,
            lm_eval_path=lm_eval_path,
            task_id=task_id,
            progress=progress,
        )
    # First what needs no disk: a full one then leaves the figures.
    if not quiet:
        warn(report.warnings)
    if json:
        emit_json(report.as_dict())
    else:
        _print(report)
    if html is not None:
        report.write_html(html, overwrite=overwrite)
    if answers is not None:
        report.write_jsonl(answers, overwrite=overwrite)
    if harness and not report.harness:
        raise typer.Exit(2)


def _listed(values: Sequence[str] | None) -> list[str]:
    """Values given several times, or with commas between."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _named(models: Sequence[str], *, where: str) -> dict[str, str]:
    """``NAME=MODEL``, or a model that is named as its folder; a path that exists is never taken apart."""
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.evaluate.model_entries import is_folder, named

    found: dict[str, str] = {}
    plain = []
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or is_folder(model):
            plain.append(model)
        elif not name or not path:
            raise MixmergeError(Fault(where, f"is {model!r}", "NAME=MODEL, or MODEL"))
        elif name in found:
            raise MixmergeError(Fault(where, f"two are called {name!r}", run="Give each a name of its own"))
        else:
            found[name] = path
    for name, model in named(plain, where=where).items():
        if name in found:
            raise MixmergeError(Fault(where, f"two are called {name!r}", run="Name them: NAME=MODEL"))
        found[name] = model
    return found


def _tasks(
    tasks: Path | None,
    task: str | None,
    metric: str | None,
    *,
    own: str | None,
    head: str | None,
    needed: bool,
) -> Path | dict[str, object] | tuple[EvalTask, ...]:
    """A tasks file, what would stand in one of the task that options describe, or none."""
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.evaluate.task_file import one_task

    if tasks is not None and task is not None:
        raise MixmergeError(Fault("--task", "stands beside --tasks", "One of them"))
    for option, value in (("--metric", metric), ("--own", own), ("--head", head)):
        if value is not None and task is None:
            raise MixmergeError(Fault(option, "goes with --task", "In a tasks file it is a key of each task"))
    if tasks is not None:
        return tasks
    if task is not None:
        if metric is None:
            raise MixmergeError(Fault("--task", "needs a metric", run="Name it by --metric"))
        return one_task(task, metric, expert=own, head=head)
    if needed:
        raise MixmergeError(
            Fault("--tasks", "is missing", "A tasks file; or --task and --metric; or --lm-eval")
        )
    return ()


def _dtype(name: str) -> Dtype:
    from typing import get_args

    from mixmerge.engines.loading import Dtype
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.registry import choices

    known: dict[str, Dtype] = {one: one for one in get_args(Dtype)}
    if name not in known:
        raise MixmergeError(Fault("--dtype", f"is {name!r}", choices(name, list(known))))
    return known[name]


def _print(report: ModelReport) -> None:
    from rich.console import Console

    from mixmerge.cli.show import table

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    if report.rows:
        console.print(report.render("score in % (share of its own expert's)"))
    for one in report.spreads:
        print(
            f"seeds {', '.join(map(str, one.seeds))}: average {100 * one.mean:.1f} "
            f"({100 * one.low:.1f} to {100 * one.high:.1f}, standard deviation {100 * one.deviation:.1f})"
        )
    if report.harness:
        rows = [
            (model, task, name, f"{value:.4f}")
            for model, tasks in report.harness.items()
            for task, figures in tasks.items()
            for name, value in figures.items()
        ]
        table("lm-evaluation-harness", ("model", "task", "figure", "value"), rows, text=(0, 1, 2))
    for note in report.notes:
        print(f"note: {note}")
    for number, advice in enumerate(report.advice, 1):
        print(f"next {number}: {advice.text} {advice.why} (source: {advice.source})")
