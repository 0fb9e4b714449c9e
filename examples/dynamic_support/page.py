"""The report on twins: tables, whether the bar is met, and the figure over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from merging_support.fusion import read
from merging_support.page import results_of
from merging_support.suites import slug
from merging_support.table import Result, interval, recovery, retention

from dynamic_support.small import NAME, entries_of
from dynamic_support.twins import RANKS

SUITES = (NAME, "encoders", "generative")
# The bar: recovered of what the best static merge leaves, and share of the experts' bytes.
GAP, STORAGE = 0.8, 0.2
SHOWN = 4  # static merges in a table


def found_twins(folder: Path) -> dict[str, dict[str, Any]]:
    """Name to scores, the smallest banks first."""
    found = {file.stem: read(file) for file in sorted((folder / "twins").glob("*.json"))}
    return dict(sorted(found.items(), key=lambda named: named[1]["storage"]))


def statics(folder: Path, suite: str) -> list[Result]:
    """Rows of merge_real that are one model for all tasks."""
    entries = [entry for entry in entries_of(suite) if not entry.per_task]
    return [row for entry in entries if (row := results_of(folder, entry))]


def shown_statics(folder: Path, suite: str, twins: dict[str, Any]) -> list[Result]:
    """The best static merges, best first, and those that are the shared part of a twin."""
    found = sorted(statics(folder, suite), key=Result.average, reverse=True)
    shared = {name.partition("--")[0] for name in twins}
    return [row for place, row in enumerate(found) if place < SHOWN or slug(row.name) in shared]


def twins_text(work: Path, suite: str) -> str:
    """Markdown of one suite."""
    folder = work / suite
    twins = found_twins(folder)
    if not twins:
        return "not run yet\n"
    own = read(folder / "test-experts.json")["right"]
    experts = {task: sum(right) / len(right) for task, right in own.items()}
    ceiling = sum(experts.values()) / len(experts)
    best = max(statics(folder, suite), key=Result.average)
    start = best.average()
    whole = f"{max(twin['experts'] for twin in twins.values()) / 1e6:.1f} MB = 100%"
    lines = [
        f"Experts {ceiling:.1%}; the best static merge on the same test rows is {best.name}, {start:.1%}.",
        "",
        f"| model | {' | '.join(experts)} | average | 95 % interval | of the gap | worst task keeps | stored beside "
        "one model | tokens/s, of the shared model's |",
        f"|---|{'--:|' * len(experts)}--:|:-:|--:|--:|--:|--:|",
        _line(Result("experts, each on its own task", (own,)), experts, start, whole, ""),
        *(_line(row, experts, start, "0", "") for row in shown_statics(folder, suite, twins)),
    ]
    for name, twin in twins.items():
        stored = f"{twin['storage'] / 1e6:.1f} MB = {twin['storage'] / twin['experts']:.1%}"
        speed = f"{twin['speed']['mixture']:,.0f} of {twin['speed']['shared']:,.0f}"
        lines.append(_line(Result(f"{name}, own router", (twin["own"],)), experts, start, stored, speed))
        lines.append(_line(Result(f"{name}, told the task", (twin["oracle"],)), experts, start, stored, ""))
    return "\n".join([*lines, "", *_bars(twins, best, start, ceiling)]) + "\n"


def _line(result: Result, experts: dict[str, float], start: float, stored: str, speed: str) -> str:
    ceiling = sum(experts.values()) / len(experts)
    low, high = interval(result.seeds[0])
    worst, kept = retention(result, experts)
    cells = [f"{result.score(task):.1%}" for task in experts]
    cells += [f"{result.average():.1%}", f"{low:.1%} to {high:.1%}"]
    cells += [f"{recovery(result.average(), start, ceiling):.0%}", f"{worst} {kept:.0%}", stored, speed]
    return f"| {result.name} | {' | '.join(cells)} |"


def _bars(twins: dict[str, dict[str, Any]], best: Result, start: float, ceiling: float) -> list[str]:
    """Whether a twin with its own router meets the bar, said of each."""
    lines = []
    usual = {task: np.mean([right[task] for right in best.seeds], 0).tolist() for task in best.seeds[0]}
    for name, twin in twins.items():
        average = Result(name, (twin["own"],)).average()
        low, high = interval(twin["own"], usual)
        gap, stored = recovery(average, start, ceiling), twin["storage"] / twin["experts"]
        met = low > 0 and gap >= GAP and stored <= STORAGE
        lines.append(
            f"- {name}: {average - start:+.1%} ({low:+.1%} to {high:+.1%}) over the best static merge, "
            f"{gap:.0%} of the gap (bar {GAP:.0%}), {stored:.1%} of the experts' storage (bar {STORAGE:.0%}): "
            f"{'met' if met else 'NOT met'}"
        )
    return lines


def draw_ranks(work: Path, out: Path) -> None:
    """Average retention over the rank of the parts: own router, told the task, and the best static merge."""
    from mixmerge.evaluate.drawing import COLOURS, as_png, new_panels

    swept_in = {
        suite: {rank: twin for rank in RANKS for twin in _of_rank(work / suite, rank)} for suite in SUITES
    }
    there = [suite for suite, swept in swept_in.items() if swept]
    if not there:
        return
    figure, panels = new_panels(4.5 * len(there), 3.6, 1, len(there))
    for panel, suite in zip(panels, there, strict=True):
        folder = work / suite
        panel.set_title(suite)
        own = read(folder / "test-experts.json")["right"]
        ceiling = sum(sum(right) / len(right) for right in own.values()) / len(own)
        swept = swept_in[suite]
        for colour, (key, label) in zip(
            COLOURS, (("own", "own router"), ("oracle", "told the task")), strict=False
        ):
            kept = [Result("", (twin[key],)).average() / ceiling for twin in swept.values()]
            panel.plot(list(swept), kept, marker="o", color=colour, label=label)
        best = max(result.average() for result in statics(folder, suite)) / ceiling
        panel.axhline(best, color="grey", linestyle="--", label="best static merge")
        panel.set_xscale("log", base=4)
        panel.set_xticks(list(RANKS), [str(rank) for rank in RANKS])
        panel.set_xlabel("rank")
        panel.set_ylabel("share of the experts' average")
        panel.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(as_png(figure))


def _of_rank(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The twin of the sweep with this rank: not that whose shared part is task arithmetic."""
    files = sorted((folder / "twins").glob(f"*{slug(f', rank {rank}')}.json"))
    return [read(file) for file in files if not file.stem.startswith("task-arithmetic")][:1]
