"""From answers that are right or wrong to the table: scores, intervals, recovered gap, cost beside FusionBench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
Right = dict[str, list[bool]]  # task -> every row of its test split


@dataclass(frozen=True)
class Result:
    """One row of the table: answers of every seed (one, where nothing is drawn), and what the merge cost."""

    name: str
    seeds: tuple[Right, ...]
    note: str = ""
    ours: dict[str, float] | None = None  # seconds, cpu, peak
    theirs: dict[str, float] | None = None
    against: Right | None = None  # FusionBench's answers

    def score(self, task: str) -> float:
        return float(np.mean([np.mean(right[task]) for right in self.seeds]))

    def average(self) -> float:
        return float(np.mean([self.score(task) for task in self.seeds[0]]))

    def spread(self) -> float | None:
        """Standard deviation of the average over the seeds."""
        if len(self.seeds) < 2:
            return None
        return float(
            np.std([np.mean([np.mean(right[task]) for task in right]) for right in self.seeds], ddof=1)
        )


def interval(first: Right, second: Right | None = None, *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean over tasks of an accuracy, or of a difference of two on the same rows.

    Rows are drawn within each task, the same for both: what is hard for both does not count as a difference.
    """
    draw = np.random.default_rng(seed)
    means: NDArray[np.float64] = np.zeros(DRAWS)
    for task, right in first.items():
        values = np.asarray(right, np.float64) - (np.asarray(second[task], np.float64) if second else 0.0)
        means += values[draw.integers(0, len(values), (DRAWS, len(values)))].mean(1) / len(first)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def retention(result: Result, experts: dict[str, float]) -> tuple[str, float]:
    """(task, share of its expert's score) where a merge keeps least."""
    kept = {task: result.score(task) / (score or 1.0) for task, score in experts.items()}
    task = min(kept, key=lambda name: kept[name])
    return task, kept[task]


def recovery(average: float, start: float, ceiling: float) -> float:
    """Share of the gap between task arithmetic and the experts that a merge closes."""
    return (average - start) / (ceiling - start) if ceiling > start else float("nan")


def scores_table(results: list[Result], experts: dict[str, float], start: float, *, kind: str) -> str:
    """Markdown: score of each task, average with interval or spread of seeds, recovery, worst-task retention.

    Args:
        experts: task to its own expert's score.
        start: average of the best task arithmetic.
        kind: what a row is called.
    """
    tasks = list(experts)
    ceiling = float(np.mean(list(experts.values())))
    lines = [
        f"| {kind} | {' | '.join(tasks)} | average | 95 % interval | seeds | gap recovered | worst task keeps |",
        f"|---|{'--:|' * len(tasks)}--:|:-:|--:|--:|--:|",
        f"| experts, each on its own | {' | '.join(f'{score:.1%}' for score in experts.values())} "
        f"| {ceiling:.1%} | | | 100 % | 100 % |",
    ]
    for result in results:
        low, high = interval(result.seeds[0])
        spread = result.spread()
        worst, kept = retention(result, experts)
        cells = [f"{result.score(task):.1%}" for task in tasks]
        cells += [
            f"{result.average():.1%}",
            f"{low:.1%} to {high:.1%}",
            "" if spread is None else f"± {spread:.1%}",
            f"{recovery(result.average(), start, ceiling):.0%}",
            f"{worst} {kept:.0%}",
        ]
        note = f" ({result.note})" if result.note else ""
        lines.append(f"| {result.name}{note} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def against_table(results: list[Result]) -> str:
    """Markdown: ours beside FusionBench's on the same checkpoints and rows; ratios are ours through theirs."""
    lines = [
        "| method | ours | FusionBench | difference | its 95 % interval | at least equal | processor time | memory |",
        "|---|--:|--:|--:|:-:|:-:|--:|--:|",
    ]
    for result in results:
        if result.against is None:
            continue
        theirs = float(np.mean([np.mean(right) for right in result.against.values()]))
        low, high = interval(result.seeds[0], result.against)
        ours = float(np.mean([np.mean(right) for right in result.seeds[0].values()]))
        lines.append(
            f"| {result.name} | {ours:.1%} | {theirs:.1%} | {ours - theirs:+.1%} | {low:+.1%} to {high:+.1%} "
            f"| {'yes' if high >= 0 else 'no'} "
            f"| {ratio(result, 'cpu', 's', 1)} | {ratio(result, 'peak', 'GB', 1e9)} |"
        )
    return "\n".join(lines) + "\n"


def recall_table(results: list[Result], task: str, labels: list[int], classes: list[str]) -> str:
    """Markdown: of each class of a task, the share of its rows that a merge gets right (its first seed)."""
    lines = [f"| {task} | {' | '.join(classes)} |", f"|---|{'--:|' * len(classes)}"]
    wanted = np.asarray(labels)
    for result in results:
        right = np.asarray(result.seeds[0][task], np.float64)
        shares = [f"{right[wanted == number].mean():.0%}" for number in range(len(classes))]
        lines.append(f"| {result.name} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def ratio(result: Result, key: str, unit: str, size: float) -> str:
    if not (result.ours and result.theirs and key in result.ours and key in result.theirs):
        return ""
    ours, theirs = result.ours[key] / size, result.theirs[key] / size
    return f"{ours:.3g} / {theirs:.3g} {unit} = {ours / theirs:.2f}" if theirs else ""


def result_from(name: str, found: list[dict[str, Any]], theirs: dict[str, Any] | None) -> Result:
    """A row from the JSON files of its seeds and of FusionBench's run."""
    return Result(
        name,
        tuple(one["right"] for one in found),
        note=str(found[0].get("note", "")),
        ours=found[0].get("cost"),
        theirs=theirs["cost"] if theirs else None,
        against=theirs["right"] if theirs else None,
    )
