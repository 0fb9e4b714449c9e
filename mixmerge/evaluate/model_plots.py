"""Plots of the report of models."""

from __future__ import annotations

import numpy as np

from mixmerge.evaluate.drawing import COLOURS, DARK, GREY, as_png, new_figure, shown_name
from mixmerge.evaluate.model_records import ModelReport

_COLOURS = {"merge": COLOURS[0], "expert": GREY, "base": COLOURS[3]}


def averages(report: ModelReport) -> bytes:
    """The average of every model with its interval, and its worst task."""
    averaged = [task.name for task in report.tasks if not task.held_out] or [
        task.name for task in report.tasks
    ]
    figure, axes = new_figure(7.5, 1.2 + 0.34 * len(report.rows))
    for place, row in enumerate(reversed(report.rows)):
        colour = _COLOURS[row.role]
        axes.plot(
            [row.average.low, row.average.high],
            [place, place],
            color=colour,
            linewidth=2.2,
            solid_capstyle="butt",
        )
        axes.plot(row.average.value, place, "o", color=colour, markersize=5.5)
        axes.plot(min(row.scores[name].value for name in averaged), place, "|", color=DARK, markersize=9)
    axes.set_yticks(range(len(report.rows)), [shown_name(row.name) for row in reversed(report.rows)])
    axes.set_ylim(-0.7, len(report.rows) - 0.3)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"average score, {report.level:.0%} interval")
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    for role in dict.fromkeys(row.role for row in report.rows):
        axes.plot([], [], "o-", color=_COLOURS[role], label=role)
    axes.plot([], [], "|", color=DARK, markersize=9, label="lowest task")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return as_png(figure)


def by_task(report: ModelReport) -> bytes:
    """A map of models and tasks: the share that is retained, or the score where there are no experts."""
    own = any(row.retained for row in report.rows)
    tasks = [
        task.name for task in report.tasks if not own or any(task.name in row.retained for row in report.rows)
    ]
    values = np.array(
        [
            [
                (row.retained[task].value if task in row.retained else np.nan)
                if own
                else row.scores[task].value
                for task in tasks
            ]
            for row in report.rows
        ]
    )
    figure, axes = new_figure(2.5 + 0.95 * len(tasks), 1.3 + 0.36 * len(report.rows))
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for at, line in enumerate(values):
        for task, value in enumerate(line):
            colour = "white" if not value > 0.6 else "black"
            axes.text(task, at, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(tasks)), [shown_name(name) for name in tasks], rotation=30, ha="right")
    axes.set_yticks(range(len(report.rows)), [shown_name(row.name) for row in report.rows])
    axes.set_title("% of its own expert's score" if own else "score in %", fontsize=9.5)
    return as_png(figure)
