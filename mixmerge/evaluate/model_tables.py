"""The report of models as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmerge.evaluate.model_records import ModelReport, ModelRow
from mixmerge.evaluate.tables import difference, p_value

if TYPE_CHECKING:
    from rich.table import Table


def render(report: ModelReport, title: str) -> Table:
    """Scores in per cent with the share that is retained, averages, the worst task, storage, speed and operations."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for number, name in enumerate(columns(report)):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in report.rows:
        table.add_row(*map(Text, cells(report, row)), style="" if row.role == "merge" else "dim")
    return table


def columns(report: ModelReport) -> list[str]:
    """The heads of the table."""
    held_out = any(task.held_out for task in report.tasks)
    own = any(row.retained for row in report.rows)
    return [
        "model",
        *(task.name + (" (held out)" if task.held_out else "") for task in report.tasks),
        "average",
        *(["held out"] if held_out else []),
        *(["retained", "worst task"] if own else []),
        *(["vs best expert", "p"] if report.best_single is not None else []),
        "storage",
        "tokens/s",
        "GFLOPs/token",
    ]


def cells(report: ModelReport, row: ModelRow) -> list[str]:
    """A row of the table."""
    found = [row.name + (" (transductive)" if row.transductive else "")]
    for task in report.tasks:
        share = row.retained.get(task.name)
        kept = "" if share is None else f" ({percent(share.value, digits=0)}%)"
        found.append(percent(row.scores[task.name].value) + kept)
    found.append(spread_percent(row.average))
    if any(task.held_out for task in report.tasks):
        found.append("-" if row.held_out is None else spread_percent(row.held_out))
    if any(one.retained for one in report.rows):
        kept = "-" if row.retained_average is None else f"{percent(row.retained_average.value)}%"
        worst = "-" if row.worst is None else f"{row.worst[0]} {percent(row.worst[1].value)}%"
        found += [kept, worst]
    if report.best_single is not None:
        found += [difference(row.over_best), p_value(row.over_best)]
    speed = "-" if row.speed != row.speed else f"{row.speed:,.0f}"
    flops = "-" if row.flops != row.flops else f"{row.flops / 1e9:,.3g}"
    return [*found, f"{row.storage / 1e6:,.1f} MB", speed, flops]


def percent(value: float, *, digits: int = 1) -> str:
    """``61.3`` of 0.613."""
    return "-" if value != value else f"{100 * value:.{digits}f}"


def spread_percent(value: object) -> str:
    """``61.3 [58.0, 64.1]``."""
    from mixmerge.evaluate.intervals import Estimate

    if not isinstance(value, Estimate):
        return "-"
    return f"{percent(value.value)} [{percent(value.low)}, {percent(value.high)}]"
