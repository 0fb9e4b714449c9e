"""``mixmerge search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmerge.cli.show import emit_json, step_progress, table, warn

if TYPE_CHECKING:
    from mixmerge.searching.search import Found
    from mixmerge.searching.trials import Trial


def search(
    recipe: Annotated[Path, typer.Argument(help="The recipe to start from.", show_default=False)],
    space: Annotated[Path, typer.Argument(help="What is searched: a YAML file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of trials and best.yaml.", show_default=False)],
    tasks: Annotated[
        Path,
        typer.Option("--eval", metavar="TASKS.yaml", help="Tasks, as of mixmerge eval.", show_default=False),
    ],
    objective: Annotated[str, typer.Option(help="average or worst: of the tasks' mean scores.")] = "average",
    held_out: Annotated[float, typer.Option(help="Share of the rows that no candidate is chosen by.")] = 0.5,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each task, the first ones.", show_default=False)
    ] = None,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Score rows that the merge has used.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the merges. Default: all cores.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the trials in OUT, and start again.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")] = False,
) -> None:
    """Search a recipe's parameters: merge, score, keep the best. A search that was killed goes on when run again."""
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.evaluate.task_file import read_tasks
    from mixmerge.methods import Method
    from mixmerge.recipe import read
    from mixmerge.registry import find
    from mixmerge.searching.scoring import TaskScorer
    from mixmerge.searching.search import BEST, TRIALS
    from mixmerge.searching.search import search as run
    from mixmerge.searching.space import read_space

    known: dict[str, Any] = {"average": "average", "worst": "worst"}
    dtypes: dict[str, Any] = {name: name for name in ("auto", "float32", "bfloat16", "float16")}
    for option, value, allowed in (("--objective", objective, known), ("--dtype", dtype, dtypes)):
        if value not in allowed:
            raise MixmergeError(Fault(option, f"is {value!r}", ", ".join(allowed)))
    parsed = read(recipe)
    start = parsed.require()
    method: Method = find("method", start.merge_method)
    wanted = read_space(space, method)
    scorer = TaskScorer(
        read_tasks(tasks, limit=limit),
        held_out=held_out,
        transductive=transductive,
        tuned_on=start.tuned_on,
        dtype=dtypes[dtype],
        device=device,
    )
    if overwrite:
        (out / TRIALS).unlink(missing_ok=True)
    if not quiet:
        warn(parsed.warnings)
    with step_progress(quiet=quiet) as progress:

        def tried(trial: Trial, budget: int) -> None:
            if progress is not None:
                progress("trials", trial.number + 1, budget)

        found = run(start, wanted, scorer, out, objective=known[objective], threads=threads, progress=tried)
    if json:
        emit_json(_plain(found, out / BEST))
        return
    print(out / BEST)
    _show(found)


def _plain(found: Found, path: Path) -> dict[str, Any]:
    lead = found.gain.difference
    return {
        "recipe": str(path),
        "values": dict(found.best.values),
        "trial": found.best.number,
        "worth": {"start": found.trials[0].worth, "best": found.best.worth},
        "test": {task: {"start": start, "best": best} for task, (start, best) in found.test.items()},
        "gain": {"value": lead.value, "low": lead.low, "high": lead.high},
        "failed": sum(bool(trial.fault) for trial in found.trials),
    }


def _show(found: Found) -> None:
    rows = [(task, f"{start:.3f}", f"{best:.3f}") for task, (start, best) in found.test.items()]
    table("rows that no candidate was chosen by", ("task", "recipe as it was", "best"), rows)
    values = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.best.values.items()
    )
    lead = found.gain.difference
    print(f"trial {found.best.number} of {len(found.trials)}: {values or 'the recipe as it was'}")
    print(f"gain {lead.value:+.3f} ({lead.low:+.3f} to {lead.high:+.3f})")
    if found.best.number == 0:
        print("Nothing beat the recipe as it was.")
    elif lead.low <= 0:
        print("The gain may be chance: its interval reaches 0.")
