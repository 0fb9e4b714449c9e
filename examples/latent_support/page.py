"""The tables, from the scores that are there: means over seeds with intervals, and whether the bar is met."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from merging_support.stages import write_json
from numpy.typing import NDArray

from latent_support.suite import Right, read
from latent_support.world import OWN, SPLITS, Sizes, exam_and_lessons, make, operands

DRAWS = 4000
NEW, FOLLOWED = "both new", "follow-up, new"
BAR = 0.20  # above the best control
LOSS = 0.01 + 1e-9  # of an expert's own tasks, at most; shares of thirds are not exact


@dataclass(frozen=True)
class Scored:
    """A row of the table.

    Args:
        name: of the row.
        control: it has to fail where two experts are needed.
        right: of each seed, which answers were right.
        more: what else was scored, such as with the answers before the peers.
    """

    name: str
    control: bool
    right: dict[int, Right]
    more: dict[int, Right]

    def mean(self, split: str) -> float:
        return float(np.mean([np.mean(one[split]) for one in self.right.values()]))


def scored(work: Path) -> list[Scored]:
    """All rows that were run, in the order of the first seed that has them."""
    found: dict[str, Scored] = {}
    for folder in sorted(work.glob("seed*")):
        seed = int(folder.name.removeprefix("seed"))
        for file in sorted((folder / "results").glob("*.json")):
            raw: dict[str, Any] = read(file)
            one = found.setdefault(raw["name"], Scored(raw["name"], raw["control"], {}, {}))
            one.right[seed] = raw["right"]
            if "while it learns" in raw:
                one.more[seed] = raw["while it learns"]
    return list(found.values())


def cells(seed: int, split: str, sizes: Sizes) -> list[str]:
    """Of each query of a split the cell that it asks for: queries for one cell stand and fall together."""
    world = make(sizes, seed)
    exam, _ = exam_and_lessons(world, sizes, seed)
    return ["".join(world.codes.get(name, name) for name in operands(one)) for one in exam[split]]


def interval(one: Scored, split: str, sizes: Sizes, less: Scored | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over seeds, or of a difference: cells are drawn, each with all its queries."""
    draw = np.random.default_rng(0)
    total: NDArray[np.float64] = np.zeros(DRAWS)
    for seed, right in one.right.items():
        values = np.asarray(right[split], np.float64)
        if less is not None:
            values = values - np.asarray(less.right[seed][split], np.float64)
        _, group = np.unique(cells(seed, split, sizes), return_inverse=True)
        count = np.bincount(group).astype(np.float64)
        held = np.bincount(group, values)
        drawn = draw.integers(0, len(count), (DRAWS, len(count)))
        total += held[drawn].sum(1) / count[drawn].sum(1) / len(one.right)
    low, high = np.quantile(total, [0.025, 0.975])
    return float(low), float(high)


def report_text(
    work: Path,
    order: Sequence[str],
    sizes: Sizes,
    *,
    routed: Collection[str] = (),
    ablations: Collection[str] = (),
) -> str:
    """Markdown: the table, and the bar for every row with glue.

    Args:
        work: folder of the seeds.
        order: of the rows; others follow.
        sizes: of the worlds.
        routed: rows in which either expert may answer; in others the first one's own task is not asked.
        ablations: rows that are not judged.
    """
    rows = {one.name: one for one in scored(work)}
    if not rows:
        return "not run yet\n"
    names = [name for name in order if name in rows] + [name for name in rows if name not in order]
    columns = (*SPLITS, *OWN)
    lines = [
        f"| | {' | '.join(columns)} | seeds: {NEW} |",
        f"|---|{'--:|' * len(columns)}:-:|",
    ]
    for name in names:
        one = rows[name]
        shown = [
            f"{one.mean(split):.1%}" if all(split in r for r in one.right.values()) else ""
            for split in columns
        ]
        low, high = interval(one, NEW, sizes)
        shown[SPLITS.index(NEW)] += f" ({100 * low:.0f} to {100 * high:.0f})"
        seeds = ", ".join(f"{np.mean(right[NEW]):.2f}" for _, right in sorted(one.right.items()))
        lines.append(f"| {name} | {' | '.join(shown)} | {seeds} |")
    for one in rows.values():
        if one.more:
            seen = ", ".join(
                f"{split} {np.mean([r[split] for r in one.more.values()]):.1%}" for split in SPLITS
            )
            lines += ["", f"{one.name}, with the answer in front of the peers as while it learns: {seen}."]
    judged = {name: one for name, one in rows.items() if name not in ablations}
    return "\n".join([*lines, "", *bars(judged, sizes, routed)]) + "\n"


def bars(rows: dict[str, Scored], sizes: Sizes, routed: Collection[str]) -> list[str]:
    """Whether each row with glue meets the bar, and beside it what routing alone does."""
    controls = [one for one in rows.values() if one.control]
    if not controls:
        return []
    best = max(controls, key=lambda one: one.mean(NEW))
    lines = [f"Best control on queries whose names and cells are new: {best.name}, {best.mean(NEW):.1%}.", ""]
    for one in sorted(rows.values(), key=lambda row: row.name):
        if one.control or "latent" not in one.name or len(one.right) < len(best.right):
            continue
        ahead = one.mean(NEW) - best.mean(NEW)
        low, high = interval(one, NEW, sizes, best)
        met = "met" if ahead >= BAR else "NOT met"
        routing = f", routing alone {rows['routing'].mean(NEW):.1%}" if "routing" in rows else ""
        tasks = OWN if one.name in routed else OWN[1:]
        own = ", ".join(f"{task} {100 * (one.mean(task) - 1):+.1f}" for task in tasks)
        kept = "kept" if all(one.mean(task) >= 1 - LOSS for task in tasks) else "NOT all kept"
        lines.append(
            f"- {one.name}: {100 * ahead:+.1f} points ({100 * low:+.0f} to {100 * high:+.0f}) over it{routing}: "
            f"{met}; own tasks {kept} ({own})"
        )
    return lines


def write_table(work: Path) -> None:
    """``table.json``: every row's mean of every split, and of each seed."""
    write_json(
        work / "table.json",
        {
            one.name: {
                "control": one.control,
                "mean": {split: one.mean(split) for split in next(iter(one.right.values()))},
                "seeds": {
                    seed: {split: float(np.mean(hits)) for split, hits in right.items()}
                    for seed, right in one.right.items()
                },
            }
            for one in scored(work)
        },
    )
