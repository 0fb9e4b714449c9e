"""``mixmerge zoo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.show import emit_json, step_progress

if TYPE_CHECKING:
    from mixmerge.evaluate import ScoreTable
    from mixmerge.zoo import Spec

app = typer.Typer(help="Tiny real experts to try things on, trained here.", no_args_is_help=True)

Variant = Annotated[str, typer.Option(help="Architecture and tokenizer: llama or neox.")]
Seed = Annotated[int, typer.Option(help="Another seed makes another zoo.")]
Tasks = Annotated[
    str | None, typer.Option(help="Names with commas between; all by default.", show_default=False)
]
Effort = Annotated[
    float, typer.Option(help="Share of the training steps; below 1 only to try the mechanics.")
]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def _names(tasks: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in tasks.split(",")) if tasks is not None else None


def _spec(variant: str, seed: int, tasks: str | None, effort: float) -> Spec:
    from mixmerge.zoo import TASKS, Spec

    return Spec(variant, seed, _names(tasks) or tuple(TASKS), effort)


@app.command()
def build(
    folder: Annotated[
        Path | None, typer.Argument(help="Copy the zoo here; else it stays in the cache.", show_default=False)
    ] = None,
    variant: Variant = "llama",
    seed: Seed = 0,
    tasks: Tasks = None,
    effort: Effort = 1.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train base and experts, about a minute; at once if the cache has them. Prints their folder and scores."""
    from mixmerge import zoo as library

    spec = _spec(variant, seed, tasks, effort)
    with step_progress(quiet=quiet) as progress:
        zoo = library.build(spec, progress=progress)
    if folder is not None:
        zoo = library.copy_to(zoo, folder)
    table = library.built_scores(zoo)
    if json:
        emit_json({"folder": str(zoo.folder), **table.as_dict()})
        return
    print(zoo.folder)
    show_scores(table, "held-out score in % (share of its own expert's)")


@app.command()
def path(variant: Variant = "llama", seed: Seed = 0, tasks: Tasks = None, effort: Effort = 1.0) -> None:
    """Print the folder of a zoo that has been built."""
    from mixmerge.zoo import find

    print(find(_spec(variant, seed, tasks, effort)).folder)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, hub ids or BASE+ADAPTER; the zoo's base and experts by default.",
            show_default=False,
        ),
    ] = None,
    zoo: Annotated[
        Path | None, typer.Option(help="A zoo's folder; the cached one by default.", show_default=False)
    ] = None,
    variant: Variant = "llama",
    seed: Seed = 0,
    tasks: Tasks = None,
    limit: Annotated[
        int | None, typer.Option(help="Held-out questions of each task.", min=1, show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask models the zoo's held-out questions."""
    from mixmerge import zoo as library

    found = library.Zoo.open(zoo) if zoo is not None else library.find(_spec(variant, seed, None, 1.0))
    own = {"base": str(found.base)} | {task: str(found.expert(task)) for task in found.tasks}
    with step_progress(quiet=quiet) as progress:
        table = library.score_models(
            found,
            {name: name for name in models} if models else own,
            tasks=_names(tasks),
            limit=limit,
            progress=progress,
        )
    if json:
        emit_json(table.as_dict())
    else:
        show_scores(table, "held-out score in % (share of its own expert's)")


@app.command()
def outcomes(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Write them here: .jsonl or .parquet. Else they stay with the zoo.", show_default=False
        ),
    ] = None,
    zoo: Annotated[
        Path | None,
        typer.Option(help="A zoo's folder; else the cached one, built if need be.", show_default=False),
    ] = None,
    variant: Variant = "llama",
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option(help="Held-out questions of each task.", min=1, show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask every expert every held-out question: outcomes to fit routers on. Prints their file and mean scores."""
    from mixmerge import zoo as library
    from mixmerge.errors import Fault, MixmergeError, OutputError
    from mixmerge.zoo.outcomes import FILE, scores_by_task

    if file is None and limit is not None:
        raise MixmergeError(Fault("--limit", "only all outcomes stay with the zoo", run="Name a FILE too"))
    if file is not None and file.exists() and not overwrite:
        raise OutputError(Fault(str(file), "exists already", run="Name another file, or pass --overwrite"))
    with step_progress(quiet=quiet) as progress:
        if zoo is None:
            found = library.build(_spec(variant, seed, None, 1.0), progress=progress)
        else:
            found = library.Zoo.open(zoo)
        table = library.outcomes(found, limit=limit, progress=progress)
    kept = found.folder / FILE
    if file is not None:
        table.write(file)
    elif not kept.is_file():
        raise OutputError(Fault(str(kept), "cannot be written", run="Name a FILE"))
    scores = scores_by_task(table)
    if json:
        emit_json({"path": str(file or kept), **scores.as_dict()})
        return
    print(file or kept)
    show_scores(scores, "mean score in % (share of the task's own expert's)")


def show_scores(table: ScoreTable, title: str) -> None:
    """The table on stdout, not folded where nobody looks at a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table.render(title))
