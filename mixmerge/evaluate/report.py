"""The report as one HTML page: tables, warnings and plots, all inline; nothing is loaded, nothing runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mixmerge.evaluate import plots
from mixmerge.evaluate.pages import figure, lines, page, table
from mixmerge.evaluate.records import PairReport, RoutingReport, Row
from mixmerge.evaluate.tables import difference, dollars, number, p_value, signed, spread


def to_html(report: RoutingReport, *, title: str = "Routers") -> str:
    """The whole page.

    Names and texts are escaped; images are data. The page asks browsers, by a content security policy, to load
    and run nothing.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(report.ids):,} queries, {len(report.experts)} experts; policy {escape(report.policy)}; "
        f"{report.level:.0%} intervals from {report.resamples:,} resamples of the queries, seed {report.seed}.</p>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report.all_warnings()),
        "<h2>Scores</h2>",
        _scores(report.rows),
        figure(plots.gains(report), "Gain over the best single expert"),
        *_costs(report),
        *_pair(report.pair, plots.strong_share(report)),
        "<h2>Choices</h2>",
        figure(plots.selection(report), "Shares of the experts in the choices"),
        _choices(report.rows),
        *_calibration(report),
        "<h2>Notes</h2>",
        lines(report.notes),
    ]
    return page(title, parts)


def _scores(rows: Sequence[Row]) -> str:
    others = sorted({name for row in rows for name in row.against})
    head = ["", "score", "vs best single", "p", "vs random", "gap to task oracle", "gap to query oracle"]
    head += [f"vs {name}" for name in others] + ["scored", "unknown", "abstained"]
    return table(
        head,
        (
            (
                row.role,
                [
                    row.name,
                    spread(row.score),
                    difference(row.over_best),
                    p_value(row.over_best),
                    signed(row.over_random.difference.value),
                    number(row.below_task),
                    number(row.regret),
                    *(difference(row.against.get(name)) for name in others),
                    *(f"{count:,}" for count in (row.scored, row.unknown, row.abstained)),
                ],
            )
            for row in rows
        ),
    )


def _costs(report: RoutingReport) -> list[str]:
    if not any(row.cost is not None for row in report.rows):
        return []
    head = [
        "",
        "~$ per 1,000 queries" if report.estimated else "$ per 1,000 queries",
        "AIQ",
        "over zero router",
        "p",
        "cost saved",
        "score gained",
        "$ ratio",
    ]
    cells = []
    for row in report.rows:
        curve = row.curve
        traded = ["-"] * 5
        if curve is not None:
            saved = "never reached" if curve.saved is None else f"{curve.saved:.1%}"
            traded = [spread(curve.aiq), difference(curve.over_zero), p_value(curve.over_zero), saved]
            traded.append(signed(curve.gained))
        paid = "-" if row.cost is None else dollars(1000 * row.cost.value)
        cells.append((row.role, [row.name, paid, *traded, number(row.optimality.cost_ratio)]))
    image = plots.cost_quality(report)
    low, high = report.cost_range or (math.nan, math.nan)
    return [
        "<h2>Cost</h2>",
        *([figure(image, "Score against cost")] if image is not None else []),
        table(head, cells),
        '<p class="note">AIQ: mean height of a router\'s non-decreasing hull from '
        f"${dollars(1000 * low)} to ${dollars(1000 * high)} per 1,000 queries. Zero router: the hull of the single "
        "experts. Cost saved: at the best single expert's score. Score gained: at its cost. $ ratio: the query "
        "oracle's cost over the row's, where the row chose a best expert. Hulls take the best settings of the very "
        f"queries shown.{escape(_estimated(report))}</p>",
    ]


def _estimated(report: RoutingReport) -> str:
    of = ", ".join(report.estimated)
    return f" Costs of {of} are estimates; the notes say how." if of else ""


def _pair(pair: PairReport | None, image: bytes | None) -> list[str]:
    if pair is None or not pair.rows:
        return []
    parts = list(next(iter(pair.rows.values())).calls)
    head = [
        "",
        "APGR",
        "APGR, every threshold",
        *(f"CPT({part:.0%})" for part in parts),
        "vs prompt length",
        "p",
    ]
    rows = [
        (
            "router",
            [
                name,
                spread(row.apgr),
                number(row.exact),
                *("-" if math.isnan(row.calls[part]) else f"{row.calls[part]:.1%}" for part in parts),
                difference(row.over_length),
                p_value(row.over_length),
            ],
        )
        for name, row in pair.rows.items()
    ]
    return [
        f"<h2>Calls to {escape(pair.strong)}</h2>",
        *([figure(image, "Score against the share of strong calls")] if image is not None else []),
        table(head, rows),
        f'<p class="note">{pair.queries:,} queries on which {escape(pair.weak)} and {escape(pair.strong)} are scored. '
        "APGR: mean part of the gap between them that is recovered. CPT: smallest share of calls to the strong "
        "expert that recovers so much of it.</p>",
    ]


def _choices(rows: Sequence[Row]) -> str:
    changes = sorted({change for row in rows for change in row.stays})
    head = ["", "entropy", "most chosen", "best was chosen", "part of the oracle's score", "seconds"]
    head += [f"stays under {change}" for change in changes]

    def cells(row: Row) -> list[str]:
        name, share = max(row.shares.items(), key=lambda item: item[1])
        return [
            row.name,
            number(row.entropy),
            f"{name} {share:.0%}" if share > 0 else "-",
            *(
                "-" if math.isnan(x) else f"{x:.1%}"
                for x in (row.optimality.selection, row.optimality.score_ratio)
            ),
            number(row.seconds, digits=2),
            *(f"{row.stays[change]:.1%}" if change in row.stays else "-" for change in changes),
        ]

    return table(head, ((row.role, cells(row)) for row in rows))


def _calibration(report: RoutingReport) -> list[str]:
    image = plots.reliability(report)
    if image is None:
        return []
    known = [row for row in report.rows if row.calibration is not None]
    head = ["calibration error", "all experts", *report.experts]
    cells = [
        (
            row.role,
            [
                row.name,
                number(row.calibration.pooled.error()),
                *(
                    number(row.calibration.experts[name].error()) if name in row.calibration.experts else "-"
                    for name in report.experts
                ),
            ],
        )
        for row in known
        if row.calibration is not None
    ]
    return [
        "<h2>Calibration</h2>",
        figure(image, "Outcomes against expected scores"),
        '<p class="note">Red: all experts together, in bins of equal mass. Faint: each expert.</p>',
        table(head, cells),
    ]
