"""The results page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mixmerge.evaluate.intervals import Comparison, Estimate
from mixmerge.evaluate.records import RoutingReport, Row
from routing_support import many_experts, two_experts
from routing_support.many_experts import Found
from routing_support.two_experts import PUBLISHED, DataSet, Line

HEAD = """# Routing on real outcomes

Made by `examples/routing_results.py` ({command}), with the data its help names;
nothing is downloaded. Embeddings are the default: TF-IDF, SVD and the shape of the text, fitted on each training
part alone. Routers have their default options unless a line says otherwise.
"""

TWO = """## Two experts: RouteLLM's data

GPT-4-1106 is strong, Mixtral-8x7B weak; prompts that RouteLLM's authors exclude are left out. APGR is the average part
of the gap between them that is recovered (0.5 is chance), CPT(x) the share of calls to the strong expert that recovers
x % of it, both as RouteLLM's code defines them. Mean of {draws} draws with its 95 % interval: it says how far the mean
would move with other draws, not with other queries. *sd* is between draws.

The published rows (arXiv 2406.18665v4, tables 1 to 3) are of routers trained on Arena battles and judged or gold
labels, and are not remade here: their checkpoints and embeddings have to be downloaded. On MMLU they had about as many
gold labels as ours; on GSM8K and MT-Bench ours are trained on labels of the same data set, theirs are not. MT-Bench has
72 questions: differences below 0.1 mean nothing there.
"""

MANY = """## Nine experts: LLMRouter's data

{train} training queries and {test} test queries, of which {leaked} are in the training file word for word; the others
are the clean rows, as they are counted elsewhere, {near} of which are near copies of training queries. The router is
chosen by grouped five-fold cross-validation inside the training file ({partitions}); the gain is over the
expert that is best on each training part, paired by query, with its 95 % bootstrap interval.
"""

TESTED = """Then all are fitted on the training file and tested once. Best single is the expert with the best training
mean. The argmax-label kNN (k = 5, the first listed of tied experts) is what the field's toolkit trains on.
"""

COST = """### Cost

The candidates' prices per million tokens, with 0.25 tokens a character of the prompt and 256 tokens an answer: no
tokens were recorded. AIQ is the mean height of the non-decreasing convex hull of a router's settings over the range of
costs common to all (RouterBench's definition); the zero router is the hull of the single experts. *Saved* is the part
of the best single expert's cost that the router saves at that expert's score.
"""


def page(
    *,
    command: str,
    draws: int,
    repeats: int,
    sets: Sequence[tuple[DataSet, list[Line]]],
    found: Found,
) -> str:
    """Everything, bars last measured first shown."""
    lines = {data.name: rows for data, rows in sets}
    bars = [*two_experts.bars(lines), *many_experts.bars(found)]
    parts = [HEAD.format(command=command), _bars(bars), TWO.format(draws=draws)]
    parts += [_two(data, rows) for data, rows in sets]
    parts.append(
        MANY.format(
            train=len(found.train),
            test=len(found.test),
            leaked=len(found.leaks.exact),
            near=len(found.leaks.near),
            partitions="one partition" if repeats == 1 else f"{repeats} partitions",
        )
    )
    parts += [_folds(found), TESTED, *(_tested(name, found) for name in found.reports)]
    parts += [COST, _costs(next(iter(found.reports.values())))]
    return "\n".join(parts)


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"| {' | '.join(head)} |\n{rule}\n{body}\n"


def _bars(bars: Sequence[tuple[str, str, str, bool]]) -> str:
    rows = [(what, figure, bar, "met" if met else "MISSED") for what, figure, bar, met in bars]
    return "## Bars\n\n" + _rows(("what", "figure", "bar", ""), rows)


def _two(data: DataSet, lines: Sequence[Line]) -> str:
    ours, most = sorted(lines, key=lambda line: -line.apgr.value), max(line.draws for line in lines)

    def named(line: Line) -> str:
        return line.name if line.draws == most else f"{line.name} ({line.draws} draws)"

    rows = [
        (named(line), *(f"{100 * part:.1f}" for part in line.calls), _interval(line.apgr), _sd(line))
        for line in ours
    ]
    rows += [
        (f"*RouteLLM: {name}*", "", f"{cpt50:.1f}", f"{cpt80:.1f}", f"{apgr:.3f}", "")
        for name, (cpt50, cpt80, apgr) in PUBLISHED[data.name].items()
    ]
    title = f"### {data.name}: {len(data.table):,} queries, {data.how}\n\n"
    return title + _rows(("router", "CPT20", "CPT50", "CPT80", "APGR", "sd"), rows)


def _folds(found: Found) -> str:
    ordered = sorted(found.folds, key=lambda fold: -fold.gain.difference.value)
    rows = [
        (
            f"**{f.name}**" if f.name == found.chosen else f.name,
            f"{f.score:.3f}",
            _difference(f.gain),
            f"{f.gain.p:.3f}",
        )
        for f in ordered
    ]
    return _rows(("router, cross-validated", "score", "gain over best single", "p"), rows)


def _tested(name: str, found: Found) -> str:
    report = found.reports[name]
    rows = [
        (
            f"**{row.name}** (chosen)" if row.name == found.chosen else row.name,
            _interval(row.score),
            "" if row.over_best is None else _difference(row.over_best),
            f"{row.regret:.3f}",
        )
        for row in sorted(report.rows, key=lambda row: -row.score.value)
    ]
    rows.append(("argmax-label kNN", f"{found.argmax_label[name]:.3f}", "", ""))
    return f"### Tested on {name}\n\n" + _rows(
        ("router", "score", "over best single", "gap to query oracle"), rows
    )


def _costs(report: RoutingReport) -> str:
    priced = [
        (row, row.curve, row.cost) for row in report.rows if row.curve is not None and row.cost is not None
    ]
    rows = [
        (
            row.name,
            f"{1000 * cost.value:.3f}",
            _interval(curve.aiq),
            _difference(curve.over_zero),
            "never there" if curve.saved is None else f"{100 * curve.saved:.0f} %",
        )
        for row, curve, cost in sorted(priced, key=_by_aiq)
    ]
    return _rows(("router", "$ per 1,000 at best score", "AIQ", "over the zero router", "saved"), rows)


def _sd(line: Line) -> str:
    return f"{line.sd:.3f}" if line.draws > 1 else "-"


def _by_aiq(given: tuple[Row, object, object]) -> float:
    curve = given[0].curve
    return 0.0 if curve is None else -curve.aiq.value


def _interval(value: Estimate) -> str:
    plain = f"{value.value:.3f}"
    return plain if value.low != value.low else f"{plain} ({value.low:.3f} to {value.high:.3f})"


def _difference(given: Comparison) -> str:
    value = given.difference
    return f"{value.value:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def summary(lines: Mapping[str, list[Line]], found: Found) -> list[str]:
    """The bars, a line each, for the terminal."""
    rows = [*two_experts.bars(lines), *many_experts.bars(found)]
    return [f"{'met   ' if met else 'MISSED'} {what}: {figure}, bar {bar}" for what, figure, bar, met in rows]
