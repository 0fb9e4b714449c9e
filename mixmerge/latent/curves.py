"""What is known of a fit when it is over: the loss by steps, and what rows that were held out say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SHOWN = 500  # points of the loss that are written; of more, means of neighbours
_TERMS = ("entropy", "balance", "consistency", "keep")


@dataclass(frozen=True)
class Point:
    """A step of the optimiser: the terms of its loss; those of the routing are None where nothing decides, that of rows
    to keep where there are none."""

    step: int
    lm: float
    entropy: float | None = None
    balance: float | None = None
    consistency: float | None = None
    keep: float | None = None


@dataclass(frozen=True)
class Look:
    """What the rows that are held out say after a step.

    Args:
        step: 0: before the first.
        per_byte: nats per byte of the answers: the measure by which looks are compared, whoever answers.
        per_token: nats per token of the primaries.
    """

    step: int
    per_byte: float
    per_token: float


@dataclass(frozen=True)
class Report:
    """A fit.

    Args:
        steps: that were done.
        stopped_early: patience ended before the steps.
        best: the step whose values were kept.
        points: of the loss.
        looks: at the rows that are held out; empty if there are none.
        alone: nats per byte of these rows by the same primaries, reading nobody; None without such rows.
        rows, held_out: how many were learned from, and how many judged.
        seconds: that steps took, those before a kill included.
        rows_per_second, tokens_per_second: of steps; tokens are those of the primaries.
    """

    steps: int
    stopped_early: bool
    best: int
    points: tuple[Point, ...]
    looks: tuple[Look, ...]
    alone: float | None
    rows: int
    held_out: int
    seconds: float
    rows_per_second: float
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with no more points than can be seen."""
        return {**asdict(self), "points": [asdict(one) for one in thinned(self.points)]}

    def facts(self) -> dict[str, Any]:
        """What a command says of it."""
        start = self.looks[0].per_byte if self.looks else None
        best = next((one.per_byte for one in self.looks if one.step == self.best), None)
        keys = ("steps", "stopped_early", "best", "rows", "held_out", "alone", "seconds")
        return {
            **{key: getattr(self, key) for key in keys},
            "start_per_byte": start,
            "best_per_byte": best,
            "rows_per_second": self.rows_per_second,
            "tokens_per_second": self.tokens_per_second,
        }


def thinned(points: Sequence[Point], most: int = _SHOWN) -> list[Point]:
    """Means of neighbours, so that no more than ``most`` points are left; each at its last step."""
    size = -(-len(points) // most)
    found = []
    for start in range(0, len(points), max(1, size)):
        group = points[start : start + size]
        means: dict[str, float | None] = {}
        for term in _TERMS:
            known = [value for one in group if (value := getattr(one, term)) is not None]
            means[term] = sum(known) / len(known) if known else None
        found.append(Point(group[-1].step, sum(one.lm for one in group) / len(group), **means))
    return found


def write_report(report: Report, folder: Path, *, data: str, plot: str, more: Mapping[str, Any]) -> None:
    """The report as JSON, and the curves as PNG where matplotlib is installed.

    Args:
        report: of the fit.
        folder: to write into.
        data, plot: names of the files.
        more: facts to write beside it.
    """
    text = json.dumps({**report.as_dict(), **more}, indent=1, ensure_ascii=False)
    (folder / data).write_text(text + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4), dpi=130, layout="constrained")
    loss, judged = figure.subplots(1, 2)
    shown = thinned(report.points)
    loss.plot([one.step for one in shown], [one.lm for one in shown], color="#4477AA")
    loss.set(title="rows to learn from", xlabel="step", ylabel="nats per token")
    if report.looks:
        judged.plot(
            [one.step for one in report.looks], [one.per_byte for one in report.looks], color="#EE6677"
        )
        if report.alone is not None:
            judged.axhline(report.alone, color="#888888", linestyle=":", label="primaries alone")
            judged.legend(frameon=False)
    judged.set(title="rows that are held out", xlabel="step", ylabel="nats per byte")
    figure.savefig(folder / plot)
