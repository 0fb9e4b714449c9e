"""The report as a table for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mixmerge.evaluate.intervals import Comparison, Estimate
from mixmerge.evaluate.records import RoutingReport, Row

if TYPE_CHECKING:
    from rich.table import Table


def render(report: RoutingReport, title: str) -> Table:
    """Score, gains and gaps of every row; costs where they are known."""
    from rich.table import Table
    from rich.text import Text

    priced = any(row.cost is not None for row in report.rows)
    dollar = "~$ per 1,000" if report.estimated else "$ per 1,000"
    table = Table(title=Text(title), title_justify="left")
    for name, justify in _columns([dollar] if priced else []):
        table.add_column(name, justify="left" if justify else "right", no_wrap=not justify, overflow="fold")
    for row in report.rows:
        table.add_row(*map(Text, _cells(row, priced)), style="" if row.role == "router" else "dim")
    return table


def _columns(dollar: list[str]) -> list[tuple[str, bool]]:
    names = ["score", "vs best single", "p", "vs random", "gap to task", "gap to query"]
    names += [*dollar, "AIQ", "cost saved"] if dollar else []
    return [("router", True), *((name, False) for name in names)]


def _cells(row: Row, priced: bool) -> list[str]:
    name = row.name + (" (!)" if row.warnings else "")
    cells = [
        name,
        spread(row.score),
        difference(row.over_best),
        p_value(row.over_best),
        signed(row.over_random.difference.value),
        number(row.below_task),
        number(row.regret),
    ]
    if priced:
        curve = row.curve
        cells += [
            "-" if row.cost is None else dollars(1000 * row.cost.value),
            "-" if curve is None else number(curve.aiq.value),
            "-" if curve is None or curve.saved is None else f"{curve.saved:.0%}",
        ]
    return cells


def number(value: float | None, *, digits: int = 3) -> str:
    """``0.123``, or ``-`` for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float, *, digits: int = 3) -> str:
    """``+0.123``."""
    return "-" if math.isnan(value) else f"{value:+.{digits}f}"


def spread(value: Estimate) -> str:
    """``0.123 [0.100, 0.140]``."""
    if math.isnan(value.low):
        return number(value.value)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def difference(value: Comparison | None) -> str:
    """``+0.012 [-0.001, +0.025]``."""
    if value is None:
        return "-"
    of = value.difference
    return f"{signed(of.value)} [{signed(of.low)}, {signed(of.high)}]"


def p_value(value: Comparison | None) -> str:
    """``0.032``, or ``< 0.001``."""
    if value is None or math.isnan(value.p):
        return "-"
    return "< 0.001" if value.p < 0.001 else f"{value.p:.3f}"


def dollars(value: float) -> str:
    """Four digits that count."""
    return "-" if math.isnan(value) else f"{value:.4g}"
