"""What it costs an expert to read its peers while it answers, beside answering alone, in one run.

    python examples/bench_latent.py            # about ten minutes on two quiet cores
    python examples/bench_latent.py --small    # does it run?

A primary of 110 M parameters and two peers of other widths, of Llama's kind, each with a tokenizer of its own; random
weights, which cost what trained ones cost, are written to a temporary folder. The ways take turns. Figures are the
least and the median over the rounds, in processor time of one thread; bars are about both, and the worse one counts.
Memory is that of processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table as Shown

if TYPE_CHECKING:
    from bench_support.latent import Table, Times, Work

DOCS = Path(__file__).resolve().parent.parent / "docs"
DECODING = ("decoding", "B", "ms a step, least", "median", "ratio, least", "of medians", "bar")
BRIDGES = ("bridges", "theirs", "beside", "share")
MEMORY = ("memory in prompt mode", "MiB", "bar")
FUSION = ("logit fusion", "B", "search, ms", "step of the base, ms", "share", "evaluations", "bar")
BARS = {("prompt", 1): 1.10, ("chunked", 1): 1.15}


@dataclass(frozen=True)
class Sizes:
    """Of what is timed: batches of so many ``rows``, each with its prompts and rounds."""

    rows: tuple[int, ...] = (1, 16)
    prompts: tuple[int, ...] = (64, 16)
    rounds: tuple[int, ...] = (9, 4)
    tokens: int = 32
    width: int = 256


SMALL = Sizes((1, 2), (12, 8), (2, 1), 4, 32)


def verdict(way: str, rows: int, ratios: tuple[float, float]) -> str:
    """By the worse of both ratios."""
    bar = BARS.get((way, rows))
    if bar is None:
        return "-"
    return f"<= {bar:.2f}: {'met' if max(ratios) <= bar else 'MISSED'}"


def decoding(found: Times, rows: int) -> list[Sequence[str]]:
    """A line for each way."""
    from bench_support.latent import NAMES

    lines: list[Sequence[str]] = []
    for way, name in NAMES.items():
        ratios = found.ratios(way)
        said = (f"{found.least(way):.1f}", f"{found.median(way):.1f}", *(f"{one:.3f}" for one in ratios))
        lines.append((name, str(rows), *said, verdict(way, rows, ratios)))
    return lines


def memory(table: Table, prompt: str) -> list[Sequence[str]]:
    """Of the largest expert alone, and of an answer that reads the others; each in a process of its own."""
    from bench_support.latent import PRIMARY

    largest = max(
        table.loaded, key=lambda name: sum(one.numel() for one in table.loaded[name].model.parameters())
    )
    sizes = {
        name: sum(4 * one.numel() for one in each.model.parameters()) for name, each in table.loaded.items()
    }
    alone = child(table, largest, [], prompt)
    reads = [(name, 1 / len(table.loaded)) for name in table.peers]
    reading = child(table, PRIMARY, reads, prompt)
    glue = sum(4 * one.numel() for one in table.glue.parameters())
    bar = alone + glue + (64 << 20)
    met = "met" if reading <= bar else "MISSED"
    return [
        ("weights of all experts", f"{sum(sizes.values()) / 2**20:.0f}", "-"),
        (f"largest expert ({largest}) alone: peak", f"{alone / 2**20:.0f}", "-"),
        ("primary that reads the others: peak", f"{reading / 2**20:.0f}", f"<= {bar / 2**20:.0f}: {met}"),
    ]


def child(table: Table, expert: str, reads: Sequence[tuple[str, float]], prompt: str) -> int:
    """Anonymous bytes that an answer takes beyond the program."""
    arguments = [str(table.folder), expert, json.dumps(reads), table.places(), prompt]
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bench_support.latent_child", *arguments],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    return int(told["peak"] - told["before"])


def work(found: Work, prompt: int) -> list[Sequence[str]]:
    """What the bridges are and do, beside the experts."""
    reading, forwards = f"{found.reading / 1e9:.2f} GFLOP", f"{found.forwards / 1e9:.1f} GFLOP of K forwards"
    token, step = f"{found.token / 1e6:.1f} MFLOP", f"{found.step / 1e6:.0f} MFLOP of the primary"
    weights, experts = f"{found.parameters / 1e6:.2f} M", f"{found.experts / 1e6:.0f} M of the experts"
    return [
        ("parameters", weights, experts, _share(found.parameters / found.experts)),
        (f"reading a prompt of {prompt}", reading, forwards, _share(found.reading / found.forwards)),
        ("a token in prompt mode", token, step, _share(found.token / found.step)),
    ]


def _share(of: float) -> str:
    return f"{100 * of:.1f} %"


def show(console: Console, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    shown = Shown(*columns, box=MARKDOWN)
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    console.print()


def main(
    small: Annotated[bool, typer.Option(help="Sizes at which the figures mean nothing.")] = False,
    rounds: Annotated[
        int, typer.Option(min=0, help="Of every comparison; 0: as many as mean something.")
    ] = 0,
    rows: Annotated[
        int, typer.Option(min=0, help="Time batches of so many rows, and nothing else; 0: all.")
    ] = 0,
    times: Annotated[bool, typer.Option(help="Time anything; without, memory and sizes alone.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
) -> None:
    """Measure, and print each figure beside its bar."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that spin on busy cores make torch far slower
    import torch
    from bench_support import latent
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    sizes, shapes = (SMALL, latent.SMALL) if small else (Sizes(), latent.SHAPES)
    texts = [one for path in sorted(DOCS.glob("*.md")) for one in path.read_text("utf-8").split("\n## ")]
    texts = [text for text in texts if len(text) > 6 * max(sizes.prompts)]
    console = Console(width=200)
    with tempfile.TemporaryDirectory(prefix="bench-latent-") as folder:
        table = latent.Table(Path(folder), texts, shapes, width=sizes.width)
        experts = ", ".join(
            f"{name} {sum(one.numel() for one in each.model.parameters()) / 1e6:.1f} M (width {shapes[name].width})"
            for name, each in table.loaded.items()
        )
        console.print(
            f"{experts}; {sizes.tokens} tokens of each row timed a round, after prompts of "
            f"{' and '.join(map(str, sizes.prompts))}; float32, {threads} thread(s), processor time.\n"
        )
        for size, prompt, count in zip(sizes.rows, sizes.prompts, sizes.rounds, strict=True):
            if times and rows in (0, size):
                found = latent.timed(
                    table, rows=size, prompt=prompt, tokens=sizes.tokens, rounds=rounds or count
                )
                show(console, DECODING, decoding(found, size))
        if rows:
            return
        prompt = sizes.prompts[0]
        show(console, BRIDGES, work(table.work(prompt), prompt))
        show(console, MEMORY, memory(table, table.prompts(1, prompt)[0]))
    if times:
        show(console, FUSION, fused(small=small))


def fused(*, small: bool) -> list[Sequence[str]]:
    """The search of logit fusion, as a share of a step."""
    from bench_support.fusion import BAR, fusion_rows

    lines: list[Sequence[str]] = []
    for one in fusion_rows(small=small):
        met = f"< {100 * BAR:.0f} %: {'met' if one.share < BAR else 'MISSED'}"
        figures = (f"{one.search:.2f}", f"{one.base:.1f}", _share(one.share), str(one.evaluations))
        lines.append((one.mode, str(one.rows), *figures, met))
    return lines


if __name__ == "__main__":
    typer.run(main)
