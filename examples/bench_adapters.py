"""What it gains to answer requests of several adapters in one batch, over one batch for each adapter.

    python examples/bench_adapters.py                              # SmolLM2-135M, 8 adapters x 4 requests
    python examples/bench_adapters.py --base FOLDER --adapters 2   # another model

The adapters are drawn, not trained: what they say means nothing, and costs what trained ones cost. The base and all
adapters are loaded once for either way. Processor seconds stand beside seconds of the clock: where other work shares
the cores, they say more. A batch of the base alone says what the adapters cost.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mixmerge.engines.local import Dtype, TransformersEngine
from mixmerge.engines.records import Generation, Request
from mixmerge.machine import cores

BAR = 2.0  # times as fast as one batch for each adapter
TOPICS = ("the sea", "an old clock", "two friends", "a river in winter", "the last train", "a lost key")


@dataclass(frozen=True)
class Timed:
    """Seconds of the clock and of the processor."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    """What was found.

    Args:
        mixed: all requests in one batch.
        loop: one batch for each adapter.
        base: all requests in one batch, without adapters.
        tokens: that were generated, in each of the three about as many.
        same: share of the requests whose text was the same in ``mixed`` and ``loop``.
    """

    mixed: Timed
    loop: Timed
    base: Timed
    tokens: int
    same: float

    @property
    def speedup(self) -> float:
        return self.loop.wall / self.mixed.wall


def draw_adapters(base: Path, out: Path, *, count: int, rank: int) -> dict[str, str]:
    """Name -> folder of LoRA adapters on every linear layer, as PEFT writes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = {}
    for at in range(count):
        torch.manual_seed(at)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, 0.01)
        wrapped.save_pretrained(out / f"adapter{at}")
        made[f"adapter{at}"] = str(out / f"adapter{at}")
        model = wrapped.unload()
    return made


def measure(
    base: Path, adapters: dict[str, str], *, rows: int, tokens: int, rounds: int, dtype: Dtype = "float32"
) -> Measured:
    """Both ways in turn, each ``rounds`` times; the quickest of each counts.

    Args:
        base: a model folder.
        adapters: name -> folder.
        rows: requests of each adapter.
        tokens: that each may get.
        rounds: 1 or more.
        dtype: of base and adapters.
    """
    asked = [
        Request(f"{name} {at}", f"A story about {TOPICS[at % len(TOPICS)]}, part {at}.", tokens, adapter=name)
        for at in range(rows)
        for name in adapters
    ]
    plain = [replace(request, adapter=None) for request in asked]
    groups = [[request for request in asked if request.adapter == name] for name in adapters]
    with TransformersEngine(str(base), adapters=adapters, dtype=dtype, batch_tokens=10**6) as engine:

        def timed(batches: Sequence[Sequence[Request]]) -> tuple[Timed, list[Generation]]:
            wall, cpu = time.perf_counter(), time.process_time()
            found = [answer for batch in batches for answer in engine.generate(batch)]
            return Timed(time.perf_counter() - wall, time.process_time() - cpu), found

        timed([[replace(request, max_new_tokens=1) for request in asked]])  # what is done once only
        runs = [(timed([asked]), timed(groups), timed([plain])) for _ in range(rounds)]
    (_, together), (_, apart), _ = runs[0]
    said = {answer.id: answer.text for answer in apart}
    mixed, loop, alone = (min((run[way][0] for run in runs), key=lambda one: one.wall) for way in range(3))
    return Measured(
        mixed,
        loop,
        alone,
        sum(answer.tokens_out for answer in together),
        sum(said[answer.id] == answer.text for answer in together) / len(together),
    )


def show(found: Measured, console: Console) -> None:
    table = Table("batches", "seconds", "of the processor", "tokens/s")
    for name, one in (
        ("one, mixed", found.mixed),
        ("one an adapter", found.loop),
        ("base alone", found.base),
    ):
        table.add_row(name, f"{one.wall:.2f}", f"{one.cpu:.2f}", f"{found.tokens / one.wall:.0f}")
    console.print(table)
    verdict = "met" if found.speedup >= BAR else "MISSED"
    console.print(
        f"mixed batch: {found.speedup:.2f} x as fast ({found.loop.cpu / found.mixed.cpu:.2f} x in processor time);"
        f" bar: at least {BAR:g} x: {verdict}. {found.same:.0%} of the texts are the same both ways."
    )


def smollm2(out: Path) -> Path:
    """SmolLM2-135M, made as ``merge_real.py`` beside this file makes it."""
    from merging_support.generative import convert

    convert(out)
    return out


def main(
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A model folder; else SmolLM2.")
    ] = None,
    adapters: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Requests of each adapter.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way is run.")] = 3,
) -> None:
    """Measure, and print the speed beside its bar."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that spin on busy cores make torch far slower
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about what PEFT asks it
    console = Console()
    with tempfile.TemporaryDirectory() as work:
        model = base or smollm2(Path(work) / "base")
        made = draw_adapters(model, Path(work), count=adapters, rank=rank)
        console.print(f"{adapters} adapters of rank {rank} x {rows} requests, {cores()} cores")
        show(measure(model, made, rows=rows, tokens=tokens, rounds=rounds), console)


if __name__ == "__main__":
    typer.run(main)
