"""Where two experts are needed: one knows a codebook, the other a table, and queries ask for cells by code names.

    pip install 'mixmerge[zoo,route]'
    python examples/latent_codebook.py run                # three seeds; every stage is kept, so stop and start it
    python examples/latent_codebook.py run --seeds 0 --only lockstep
    python examples/latent_codebook.py real --base DIR    # a SmolLM2-135M-Instruct reads a codebook; one seed
    python examples/latent_codebook.py report --docs docs/latent-results.md

Expert ``codes`` is a Llama that reads letters and knows which digit each of 160 made-up names stands for. Expert
``table`` is a GPT-NeoX that reads byte pairs and knows what an operation makes of two digits. A query names two names
and asks for the cell. Names and cells are held out from what the glue learns from. Rows are mixtures as a user writes
them, fitted and asked by the library; controls must fail.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

# Before torch is imported: threads that spin on busy cores make it far slower, and models this small want one.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import typer
from latent_support.controls import run_controls
from latent_support.page import report_text, write_table
from latent_support.plain import PLAIN, make_outcomes, run_plain
from latent_support.real import real_text, run_real
from latent_support.rows import FIXED, ONCE, ROWS, SHUFFLED_OF, UNMASKED_OF, glue_parameters, run_row
from latent_support.suite import Steps, open_suite
from latent_support.world import Sizes
from merging_support.page import put
from merging_support.stages import say

from mixmerge.errors import MixmergeError

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for experts, glue and scores.")]
HERE = Path("latent-codebook")


@app.command()
def run(
    work: Work = HERE,
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0,1,2",
    only: Annotated[
        list[str] | None, typer.Option(help="Parts of names of rows; the default is all.")
    ] = None,
) -> None:
    """Make the experts, fit and score every row."""
    for seed in map(int, seeds.split(",")):
        suite = open_suite(work.resolve(), seed, Sizes(), Steps())
        make_outcomes(suite)
        rows = [row for row in ROWS if seed == 0 or row.name not in ONCE]
        for row in rows:
            if not only or any(part in row.name for part in only):
                try:
                    run_row(suite, row)
                except MixmergeError as error:  # one row's fault is no reason to lose the others
                    say(f"{row.name}: {error}")
        if not only:
            run_plain(suite, lora=lambda suite=suite: glue_parameters(suite, SHUFFLED_OF))
            run_controls(suite, shuffled=SHUFFLED_OF, unmasked=UNMASKED_OF)


@app.command()
def real(
    base: Annotated[Path, typer.Option(help="Folder of SmolLM2-135M-Instruct.")],
    work: Work = HERE,
) -> None:
    """A real primary, and the expert that knows the codebook."""
    run_real(work.resolve(), base)


@app.command()
def report(
    work: Work = HERE,
    docs: Annotated[
        Path | None, typer.Option(help="A Markdown page with the marks that tables go between.")
    ] = None,
) -> None:
    """The tables from the scores that are there, and table.json in the folder."""
    order = [*PLAIN, *(row.name for row in ROWS)]
    routed = [row.name for row in ROWS if row.route != FIXED]
    shown = [row.name for row in ROWS if row.ablation]
    table = report_text(work, order, Sizes(), routed=routed, ablations=shown)
    found = {"codebook": table, "real": real_text(work)}
    write_table(work)
    for name, text in found.items():
        print(f"## {name}\n\n{text}")
        if docs is not None:
            put(docs, name, text)


if __name__ == "__main__":
    app()
