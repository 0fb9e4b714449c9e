"""The report of models as one HTML page."""

from __future__ import annotations

from html import escape

from mixmerge.evaluate import model_plots
from mixmerge.evaluate.model_records import ModelReport
from mixmerge.evaluate.model_tables import cells, columns
from mixmerge.evaluate.pages import figure, lines, page, table
from mixmerge.evaluate.tables import spread


def to_html(report: ModelReport, *, title: str = "Models") -> str:
    """The whole page. Names and texts are escaped; images are data; nothing is loaded.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    rows = sum(task.rows for task in report.tasks)
    kinds = {"merge": "router", "expert": "constant", "base": "oracle"}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(report.tasks)} tasks, {rows:,} rows; {report.level:.0%} intervals from {report.resamples:,} "
        f"resamples of the rows of each task, seed {report.seed}.</p>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings),
        *_advice(report),
        "<h2>Scores</h2>",
        table(columns(report), ((kinds[row.role], cells(report, row)) for row in report.rows)),
        figure(model_plots.averages(report), "Average scores"),
        figure(model_plots.by_task(report), "Shares retained, task by task"),
        "<h2>Intervals</h2>",
        _intervals(report),
        *_seeds(report),
        *_harness(report),
        "<h2>Notes</h2>",
        lines(report.notes),
    ]
    return page(title, parts)


def _advice(report: ModelReport) -> list[str]:
    if not report.advice:
        return []
    found = [f"{one.text} {one.why} ({one.source})" for one in report.advice]
    return ["<h2>What to try next</h2>", lines(found)]


def _intervals(report: ModelReport) -> str:
    head = [
        "",
        *(f"{task.name} ({task.metric}, {task.rows:,})" for task in report.tasks),
        "retained",
        "worst",
    ]
    return table(
        head,
        (
            (
                row.role,
                [
                    row.name,
                    *(spread(row.scores[task.name]) for task in report.tasks),
                    "-" if row.retained_average is None else spread(row.retained_average),
                    "-" if row.worst is None else spread(row.worst[1]),
                ],
            )
            for row in report.rows
        ),
    )


def _seeds(report: ModelReport) -> list[str]:
    if not report.spreads:
        return []
    head = [
        "merges that differ in the seed",
        "seeds",
        "mean of averages",
        "standard deviation",
        "lowest",
        "highest",
    ]
    rows = (
        (
            "merge",
            [
                ", ".join(one.models),
                ", ".join(map(str, one.seeds)),
                *(f"{value:.3f}" for value in (one.mean, one.deviation, one.low, one.high)),
            ],
        )
        for one in report.spreads
    )
    return ["<h2>Seeds</h2>", table(head, rows)]


def _harness(report: ModelReport) -> list[str]:
    if not report.harness:
        return []
    rows = (
        ("merge", [model, task, figure_name, f"{value:.4f}"])
        for model, tasks in report.harness.items()
        for task, figures in tasks.items()
        for figure_name, value in figures.items()
    )
    return ["<h2>lm-evaluation-harness</h2>", table(["model", "task", "figure", "value"], rows)]
