"""The report's plots as PNG images. No display and no global state of matplotlib is used."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from mixmerge.evaluate.drawing import (
    COLOURS,
    DARK,
    GREY,
    as_png,
    colours_of,
    new_figure,
    new_panels,
    shown_name,
)
from mixmerge.evaluate.records import RoutingReport, Row

_LIGHT = frozenset({"#CCBB44", "#66CCEE", "#999933", "#44AA99"})  # under dark text
_MOST = 11  # experts with a colour of their own


def gains(report: RoutingReport) -> bytes:
    """Mean score of every row minus the best single expert's, with intervals."""
    rows = [row for row in report.rows if row.over_best is not None and not np.isnan(row.score.value)]
    figure, axes = new_figure(7.5, 1.2 + 0.34 * len(rows))
    axes.axvline(0, color=DARK, linewidth=1)
    colours = {"router": COLOURS[0], "constant": GREY, "oracle": COLOURS[3]}
    for place, row in enumerate(reversed(rows)):
        gain = row.over_best.difference if row.over_best is not None else None
        if gain is None:
            continue
        colour = colours.get(row.role, GREY)
        axes.plot([gain.low, gain.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(gain.value, place, "o", color=colour, markersize=5.5)
    axes.set_yticks(range(len(rows)), [shown_name(row.name) for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"mean score minus the best single expert's, {report.level:.0%} interval")
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    for role, colour in colours.items():
        axes.plot([], [], "o-", color=colour, label=role)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return as_png(figure)


def cost_quality(report: RoutingReport) -> bytes | None:
    """Score against cost: hulls of routers with their settings, single experts, the zero router."""
    routers = [row for row in report.rows if row.curve is not None]
    if report.zero is None or report.cost_range is None:
        return None
    figure, axes = new_figure(8.5, 5.0)
    edge = 1000 * max([report.cost_range[1], *(cost for cost, _ in report.singles.values())])
    zero = report.zero
    axes.plot(
        1000 * np.append(zero.cost, edge / 1000),
        np.append(zero.score, zero.score[-1]),
        "--",
        color=GREY,
        label="zero router (hull of experts)",
    )
    for row, colour in zip(routers, colours_of(len(routers)), strict=True):
        curve = row.curve
        if curve is None:
            continue
        cost, score = (
            np.append(curve.hull.cost, edge / 1000),
            np.append(curve.hull.score, curve.hull.score[-1]),
        )
        axes.plot(1000 * curve.cost, curve.score, ".", color=colour, alpha=0.45, markersize=5)
        axes.plot(1000 * cost, score, "-", color=colour, linewidth=1.8, label=shown_name(row.name))
        if row.cost is not None:
            axes.plot(
                1000 * row.cost.value,
                row.score.value,
                "D",
                color=colour,
                markersize=6,
                markeredgecolor="white",
            )
    floor = _floor(report)
    _singles(axes, report, floor)
    axes.set_ylim(bottom=floor - 0.04 * (axes.get_ylim()[1] - floor))
    axes.set_xlim(left=0)  # and linear: what goes to two settings in parts lies on the line between them
    axes.set_xlabel("dollars per 1,000 queries" + (", estimated" if report.estimated else ""))
    axes.set_ylabel("mean score")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.plot([], [], "D", color=GREY, label="as the policy chose")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return as_png(figure)


def _singles(axes: Any, report: RoutingReport, floor: float) -> None:
    """Single experts, each with its name where there is room for it; those below the picture are counted."""
    middle = (
        min(cost for cost, _ in report.singles.values()) + max(cost for cost, _ in report.singles.values())
    ) / 2
    shown = {name: place for name, place in report.singles.items() if place[1] >= floor}
    for name, (cost, score) in shown.items():
        axes.plot(1000 * cost, score, "s", color=DARK, markersize=5)
        if len(shown) <= _MOST:
            right = cost > middle
            axes.annotate(
                shown_name(name),
                (1000 * cost, score),
                textcoords="offset points",
                xytext=(-6 if right else 6, -10),
                ha="right" if right else "left",
                fontsize=7.5,
                color=DARK,
            )
    hidden = len(report.singles) - len(shown)
    below = f" ({hidden} more below)" if hidden else ""
    axes.plot([], [], "s", color=DARK, markersize=5, label=f"single expert{below}")


def _floor(report: RoutingReport) -> float:
    """The lowest score in the picture: weak experts would press everything else into its top."""
    hulls = [row.curve.hull for row in report.rows if row.curve is not None]
    hulls += [report.zero] if report.zero is not None else []
    low, high = min(one.score[0] for one in hulls), max(one.score[-1] for one in hulls)
    settings = [float(np.nanmin(row.curve.score)) for row in report.rows if row.curve is not None]
    lowest = min([*settings, *(score for _, score in report.singles.values())])
    return max(lowest, float(low - 0.6 * (high - low)))


def selection(report: RoutingReport) -> bytes:
    """Which experts every router and oracle chooses, as bars of shares."""
    rows = [row for row in report.rows if sum(row.shares.values()) > 0]
    total = {name: sum(row.shares[name] for row in rows) for name in report.experts}
    ranked = sorted(report.experts, key=lambda name: (-total[name], name))
    shown = ranked if len(ranked) <= _MOST + 1 else ranked[:_MOST]
    figure, axes = new_figure(8.5, 1.1 + 0.36 * len(rows))
    for place, row in enumerate(reversed(rows)):
        start = 0.0
        for name, colour in zip(shown, colours_of(len(shown)), strict=True):
            axes.barh(place, row.shares[name], left=start, color=colour, edgecolor="white", linewidth=0.6)
            if row.shares[name] >= 0.08:
                middle = start + row.shares[name] / 2
                axes.text(
                    middle,
                    place,
                    f"{row.shares[name]:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=DARK if colour in _LIGHT else "white",
                )
            start += row.shares[name]
        if start < 1 - 1e-9:
            axes.barh(place, 1 - start, left=start, color="#cccccc", edgecolor="white", linewidth=0.6)
    for name, colour in zip(shown, colours_of(len(shown)), strict=True):
        axes.barh(0, 0, color=colour, label=shown_name(name))
    if len(shown) < len(ranked):
        axes.barh(0, 0, color="#cccccc", label=f"{len(ranked) - len(shown)} others")
    axes.set_yticks(range(len(rows)), [shown_name(row.name) for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the queries")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return as_png(figure)


def reliability(report: RoutingReport) -> bytes | None:
    """Mean outcome against expected score, a panel for each router: all experts together and each one."""
    rows = [row for row in report.rows if row.calibration is not None and row.calibration.pooled.count.size]
    if not rows:
        return None
    wide = min(3, len(rows))
    high = -(-len(rows) // wide)
    figure, grid = new_panels(3.1 * wide + 0.4, 3.2 * high, high, wide)
    ends = [
        end
        for row in rows
        if row.calibration is not None
        for part in (row.calibration.pooled.predicted, row.calibration.pooled.actual)
        for end in (part.min(), part.max())
    ]
    low, top = min(ends), max(ends)
    edge = 0.05 * (top - low or 1.0)
    for place, axes in enumerate(grid):
        if place < len(rows):
            _panel(axes, rows[place], low - edge, top + edge)
            axes.set_xlabel("expected score" if place >= len(rows) - wide else "")
            axes.set_ylabel("mean outcome" if place % wide == 0 else "")
        else:
            axes.axis("off")
    return as_png(figure)


def _panel(axes: Any, row: Row, low: float, high: float) -> None:
    calibration = row.calibration
    if calibration is None:
        return
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--")
    for one in calibration.experts.values():
        axes.plot(one.predicted, one.actual, "-", color=COLOURS[0], alpha=0.25, linewidth=1)
    pooled = calibration.pooled
    axes.plot(pooled.predicted, pooled.actual, "o-", color=COLOURS[1], markersize=4, linewidth=1.6)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_title(f"{shown_name(row.name)}\nerror {pooled.error():.3f}", fontsize=9)
    axes.grid(color="#e4e4e4", linewidth=0.7)


def strong_share(report: RoutingReport) -> bytes | None:
    """Two experts: mean score against the share of calls to the strong one."""
    pair = report.pair
    if pair is None or not pair.rows:
        return None
    figure, axes = new_figure(8.5, 4.8)
    known = {name: row for name, row in pair.rows.items() if row.curve is not None}
    routers = {row.name for row in report.rows if row.role == "router"}
    of_routers = [name for name in known if name in routers]
    colours = dict(zip(of_routers, colours_of(len(of_routers)), strict=True))
    styles = itertools.cycle(("-", ":", "-."))
    for name, row in known.items():
        curve = row.curve
        if curve is None:
            continue
        label = f"{shown_name(name)}: APGR {row.apgr.value:.3f}"
        if name in colours:
            axes.plot(100 * curve.share, curve.score, "o-", color=colours[name], markersize=4, label=label)
        else:
            axes.plot(100 * curve.share, curve.score, next(styles), color=GREY, label=label)
    first = next(iter(known.values())).curve
    if first is not None:
        axes.plot(
            [0, 100], [first.weak, first.strong], "--", color=DARK, linewidth=1, label="chance: APGR 0.500"
        )
    axes.set_xlabel(f"share of calls to {shown_name(pair.strong)} (%)")
    axes.set_ylabel("mean score")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return as_png(figure)
