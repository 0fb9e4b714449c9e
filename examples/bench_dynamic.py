"""What experts as low-rank changes of one base cost beside the base, PEFT's mixed batches and merging, in one run.

    python examples/bench_dynamic.py                # about ten minutes
    python examples/bench_dynamic.py --small        # does it run?
    python examples/bench_dynamic.py --constants    # what mixmerge/bank/costs.py chooses by

The base, PEFT (``adapter_names``) and a bank take turns on the same weights and adapters, which are drawn: they cost
what trained ones cost. Figures are the least and the median over the rounds, in processor time of one thread; with more
threads, in time that passes. Bars
are about the least: other work on the machine empties the caches between any two layers, and only adds to times.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from bench_support.dynamic import Times


@dataclass(frozen=True)
class Sizes:
    """Of everything that is timed."""

    width: int = 1024
    rows: int = 32
    rank: int = 16
    adapters: tuple[int, ...] = (8, 32)
    prompt: int = 16
    layers: int = 4
    hidden: int = 576
    many: int = 64
    tokens: int = 256
    rounds: int = 300


SMALL = Sizes(64, 8, 4, (2, 4), 4, 1, 96, 8, 32, 3)


@dataclass(frozen=True)
class Line:
    """One bar.

    Args:
        what: that is compared.
        figures: of each side, said.
        ratio: what the bar is about, and the same of medians.
        bar: the least it has to be, or with ``most`` the largest; None: there is none.
        most: the ratio must not be larger.
    """

    what: str
    figures: str
    ratio: tuple[float, float]
    bar: float | None = None
    most: bool = False

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return "-"
        met = self.ratio[0] <= self.bar if self.most else self.ratio[0] >= self.bar
        return f"{'<=' if self.most else '>='} {self.bar:g}: {'met' if met else 'MISSED'}"


def overheads(sizes: Sizes, adapters: int) -> list[Line]:
    """Against PEFT's mixed batch and merging row by row: a layer and a model, decoding and reading a prompt."""
    import torch
    from bench_support import dynamic

    from mixmerge.bank.gate import Run

    net = dynamic.layer(sizes.width)
    three = dynamic.Three(net, adapters=adapters, rank=sizes.rank, rows=sizes.rows)
    lines = []
    with three.mixture():
        u = torch.randn(sizes.rows, 1, sizes.width)
        found = dynamic.timed(dynamic.through(three, u), sizes.rounds * 2)
        lines.append(_beside(f"layer, {adapters} adapters, 1 token a row", found, 5.0))
        slow = {
            "PEFT's": dynamic.peft_merging_one_by_one(three, u),
            "least": dynamic.merging_one_by_one(three, u),
            "ours": lambda: three.ours[0](u),
        }
    with torch.no_grad(), three.attached.running(Run(three.batch.weights)):
        found = dynamic.timed(slow, max(3, sizes.rounds // 10))
    for way in ("PEFT's", "least"):
        what = f"layer, {adapters} adapters, 1 token a row: merging a row at a time ({way}) / ours"
        lines.append(Line(what, _said(found, way, "ours"), found.times(way, "ours"), 20.0))
    with three.mixture():
        u = torch.randn(sizes.rows, sizes.prompt, sizes.width)
        found = dynamic.timed(dynamic.through(three, u), max(3, sizes.rounds // 6))
        lines.append(_whole(f"layer, {adapters} adapters, {sizes.prompt} tokens a row", found))
    model = dynamic.small_model(layers=sizes.layers, width=sizes.hidden)
    three = dynamic.Three(model, adapters=adapters, rank=sizes.rank, rows=sizes.rows)
    ids = torch.randint(0, 2048, (sizes.rows, sizes.prompt))
    with three.mixture():
        found = dynamic.timed(dynamic.decoded(three, ids), max(3, sizes.rounds // 4))
        lines.append(_beside(f"model, {adapters} adapters, 1 token a row", found, 5.0))
        found = dynamic.timed(dynamic.read(three, ids), max(3, sizes.rounds // 30))
        lines.append(_whole(f"model, {adapters} adapters, prompts of {sizes.prompt}", found))
    return lines


def arrows(sizes: Sizes, adapters: int) -> list[Line]:
    """Arrow beside PEFT's: the gate's own work is in it."""
    import torch
    from bench_support import dynamic
    from bench_support.arrow import Arrows

    model = dynamic.small_model(layers=sizes.layers, width=sizes.hidden)
    both = Arrows(
        dynamic.Three(model, adapters=adapters, rank=sizes.rank, rows=sizes.rows), top_k=min(3, adapters)
    )
    ids = torch.randint(0, 2048, (sizes.rows, sizes.prompt))
    with both.mixture():
        what = f"model, Arrow over {adapters} adapters, 1 token a row"
        lines = [_beside(what, dynamic.timed(both.decoded(ids), max(3, sizes.rounds // 10)), None)]
        what = f"model, Arrow over {adapters} adapters, prompts of {sizes.prompt}"
        lines.append(_beside(what, dynamic.timed(both.read(ids), max(3, sizes.rounds // 60)), None))
    return lines


def types(sizes: Sizes) -> list[Line]:
    """A model in float32, in bfloat16, and in float32 whose products autocast takes in bfloat16."""
    import torch
    from bench_support import dynamic

    lines = []
    for said, dtype, cast in (
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("autocast", torch.float32, True),
    ):
        three = dynamic.Three(
            dynamic.small_model(layers=sizes.layers, width=sizes.hidden),
            adapters=sizes.adapters[0],
            rank=sizes.rank,
            rows=sizes.rows,
            dtype=dtype,
        )
        ids = torch.randint(0, 2048, (sizes.rows, sizes.prompt))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast), three.mixture():
            what = f"model in {said}, {sizes.adapters[0]} adapters, 1 token a row"
            lines.append(
                _beside(what, dynamic.timed(dynamic.decoded(three, ids), max(3, sizes.rounds // 10)), None)
            )
            found = dynamic.timed(dynamic.read(three, ids), max(3, sizes.rounds // 30))
        what = f"model in {said}, {sizes.adapters[0]} adapters, prompts of {sizes.prompt}: ours / base"
        lines.append(Line(what, _said(found, "base", "peft", "ours"), found.times("ours", "base")))
    return lines


def threaded(sizes: Sizes, threads: int) -> list[Line]:
    """The model again with more threads of torch, in time that passes."""
    import time

    import torch
    from bench_support import dynamic

    lines, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for adapters in sizes.adapters:
            model = dynamic.small_model(layers=sizes.layers, width=sizes.hidden)
            three = dynamic.Three(model, adapters=adapters, rank=sizes.rank, rows=sizes.rows)
            ids = torch.randint(0, 2048, (sizes.rows, sizes.prompt))
            what = f"{threads} threads: model, {adapters} adapters"
            with three.mixture():
                ways = dynamic.decoded(three, ids)
                found = dynamic.timed(ways, max(3, sizes.rounds // 6), clock=time.perf_counter)
                lines.append(_beside(f"{what}, 1 token a row", found, 5.0))
                ways = dynamic.read(three, ids)
                found = dynamic.timed(ways, max(3, sizes.rounds // 30), clock=time.perf_counter)
                lines.append(_whole(f"{what}, prompts of {sizes.prompt}", found))
    finally:
        torch.set_num_threads(before)
    return lines


def constant(sizes: Sizes) -> Line:
    """The same weights for all rows, folded, beside a layer that was merged for good."""
    import copy

    import torch
    from bench_support import dynamic

    three = dynamic.Three(
        dynamic.layer(sizes.width), adapters=sizes.adapters[0], rank=sizes.rank, rows=sizes.rows
    )
    weights, u = torch.rand(sizes.adapters[0]), torch.randn(sizes.rows, 1, sizes.width)
    with torch.inference_mode(), three.attached.folded(weights):
        merged = copy.deepcopy(three.base)
        merged[0].weight = three.ours[0].weight  # the same memory
        ways = {"merged": lambda: merged[0](u), "folded": lambda: three.ours[0](u)}
        found = dynamic.timed(ways, sizes.rounds * 2)
    what = "layer, one mixture for all rows: folded / merged"
    return Line(what, _said(found, *ways), found.times("folded", "merged"), 1.02, True)


def many(sizes: Sizes) -> list[Line]:
    """Top 2 of many experts for each token: time, and the largest tensor; and with gradients."""
    import torch
    from bench_support import dynamic

    from mixmerge.bank.attach import Attached
    from mixmerge.bank.gate import Run
    from mixmerge.bank.records import Bank, Entry, side_by_side

    net, ours = dynamic.layer(sizes.width), dynamic.layer(sizes.width)
    ours[0].weight = net[0].weight
    factors = torch.randn(2, sizes.many, sizes.rank, sizes.width) / sizes.width
    site = side_by_side("0.weight", [Entry(a, b) for a, b in zip(*factors, strict=True)])
    gate = dynamic.Drawn(sizes.many, 2, sizes.tokens)
    attached = Attached(ours, Bank(tuple(str(at) for at in range(sizes.many)), {"0.weight": site}, {}), gate)
    u = torch.randn(1, sizes.tokens, sizes.width)
    ways = {"base": lambda: net[0](u), "ours": lambda: ours[0](u)}
    what = f"layer, top 2 of {sizes.many} experts, {sizes.tokens} tokens"
    with attached.running(Run()):
        with torch.inference_mode():
            found = dynamic.timed(ways, max(3, sizes.rounds // 3))
        lines = [Line(f"{what}: ours / base", _said(found, *ways), found.times("ours", "base"), 2.0, True)]
        with torch.no_grad(), dynamic.Largest() as made:
            ours[0](u)
        share = made.found / (sizes.tokens * sizes.many * sizes.width)
        said = f"{made.found:,} of {sizes.tokens * sizes.many * sizes.width:,} numbers"
        lines.append(
            Line(f"{what}: largest tensor / (tokens x experts x width)", said, (share, share), 0.5, True)
        )
        u.requires_grad_(True)
        gate.weights.requires_grad_(True)

        def learned(call: object) -> None:
            call().sum().backward()  # type: ignore[operator]

        both = {way: (lambda call=call: learned(call)) for way, call in ways.items()}
        found = dynamic.timed(both, max(3, sizes.rounds // 6))
    what += ", forward and backward: ours / base"
    lines.append(Line(what, _said(found, *both), found.times("ours", "base")))
    return lines


def _beside(what: str, found: Times, bar: float | None) -> Line:
    figures = _said(found, "base", "peft", "ours")
    return Line(f"{what}: (PEFT - base) / (ours - base)", figures, found.over("peft", "ours"), bar)


def _whole(what: str, found: Times) -> Line:
    figures = _said(found, "base", "peft", "ours")
    return Line(f"{what}: PEFT / ours", figures, found.times("peft", "ours"), 1.0)


def _said(found: Times, *ways: str) -> str:
    names = {"peft": "PEFT"}
    return ", ".join(f"{names.get(way, way)} {found.least(way):.3g} ({found.usual(way):.3g})" for way in ways)


def constants() -> None:
    """Print the figures of ``mixmerge/bank/costs.py`` as this machine has them."""
    from bench_support import dynamic

    from mixmerge.bank import costs

    table = Table("constant", "here", "chosen by", box=MARKDOWN)
    for name, here in dynamic.measured_constants().items():
        table.add_row(name, f"{here:.3g}", f"{getattr(costs, name):.3g}")
    Console(width=100).print(table)


def main(
    small: Annotated[bool, typer.Option(help="Sizes at which the figures mean nothing.")] = False,
    constant_costs: Annotated[
        bool, typer.Option("--constants", help="Measure the parts of the cost model.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=0, help="Of the quickest comparisons; 0: as many as mean something.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    more_threads: Annotated[int, typer.Option(min=1, help="Of torch, for the last rows; 1: none.")] = 2,
) -> None:
    """Measure, and print each ratio beside its bar."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that spin on busy cores make torch far slower
    import torch
    from bench_support import dynamic

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if constant_costs:
        constants()
        return
    sizes = SMALL if small else Sizes()
    sizes = replace(sizes, rounds=rounds) if rounds else sizes
    console = Console(width=200)
    with dynamic.quietly():
        lines = [line for adapters in sizes.adapters for line in overheads(sizes, adapters)]
        lines += [constant(sizes), *many(sizes), *types(sizes)]
        lines += [line for adapters in sizes.adapters for line in arrows(sizes, adapters)]
        lines += threaded(sizes, more_threads) if more_threads > 1 else []
    table = Table("compared", "ms, least (median)", "ratio", "of medians", "bar", box=MARKDOWN)
    for line in lines:
        table.add_row(line.what, line.figures, *(f"{one:.3g}" for one in line.ratio), line.verdict)
    console.print(
        f"Batch {sizes.rows}, layer {sizes.width} x {sizes.width}, rank {sizes.rank}; model of {sizes.layers} layers, "
        f"width {sizes.hidden}; float32 and {threads} thread(s), in processor time, unless a row says otherwise."
    )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
