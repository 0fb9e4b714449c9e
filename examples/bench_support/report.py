"""A report for people: tables on the terminal, Markdown for the documentation, a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench_support.results import Report, Result, Runs, Verdict, megabytes, verdicts

_HEADINGS = (
    "method", "copy s", "engine s", "engine / copy", "process s", "mergekit s", "times faster",
    "peak", "peak, half model", "mergekit's peak",
)  # fmt: skip
_SERIES = (
    ("copy of the same bytes", "copy", "#9aa0a6"),
    ("mixmerge, engine", "engine", "#1a73e8"),
    ("mixmerge, process", "process", "#174ea6"),
    ("mergekit, process", "mergekit", "#e37400"),
)


def _seconds(runs: Runs) -> str:
    return "" if runs.median is None else f"{runs.median:.2f}"


def _memory(count: int | None) -> str:
    return "" if count is None else megabytes(count)


def _barred(figure: str, bar: str, met: bool) -> str:
    return f"{figure} ({bar}) {'met' if met else 'MISSED'}"


def _row(result: Result) -> list[str]:
    bars, of_copy, faster, peak = result.bars, result.of_copy, result.faster, result.process.peak
    engine = "" if of_copy is None else f"{of_copy:.2f}"
    if of_copy is not None and bars.copy is not None:
        engine = _barred(engine, f"≤ {bars.copy:g}", of_copy <= bars.copy)
    times = "" if faster is None else f"{faster:.1f}"
    if faster is not None and bars.faster is not None:
        times = _barred(times, f"≥ {bars.faster:g}", faster >= bars.faster)
    memory = _memory(peak)
    if peak is not None:
        memory = _barred(memory, f"≤ {megabytes(result.memory_bar)}", peak <= result.memory_bar)
    return [
        result.method,
        _seconds(result.copy),
        _seconds(result.engine),
        engine,
        _seconds(result.process),
        "failed" if result.mergekit_fault else _seconds(result.mergekit),
        times,
        memory,
        _memory(result.half_peak),
        _memory(result.mergekit.peak),
    ]


def _others(report: Report) -> list[Verdict]:
    """Bars that have no cell in the table of methods."""
    in_table = (": engine", ": whole process", ": peak memory")
    names = {result.method for result in report.results}
    return [
        verdict
        for verdict in verdicts(report)
        if not (verdict.what.endswith(in_table) and verdict.what.partition(":")[0] in names)
    ]


def _measures(report: Report) -> list[tuple[str, str]]:
    """Figures without a bar."""
    rows = [(f"`{command}`", f"{seconds:.2f} s") for command, seconds in report.startup.items()]
    for circumstances, rates in report.reading.items():
        rows += [
            (f"reading an expert, {circumstances}: {reader}", f"{rate / 1e9:.1f} GB/s")
            for reader, rate in rates.items()
        ]
    if report.many and report.many.process.median is not None:
        rows.append(
            (f"linear of {report.many.tensors:,} tensors, process", f"{report.many.process.median:.2f} s")
        )
    return rows


def summary(report: Report) -> str:
    found = verdicts(report)
    missed = [verdict.what for verdict in found if not verdict.met]
    return f"{len(found) - len(missed)} of {len(found)} bars met" + (
        f"; missed: {', '.join(missed)}" if missed else ""
    )


def show(report: Report) -> None:
    """Print everything."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    console.print(_table("One merge of every method", _HEADINGS, [_row(one) for one in report.results]))
    rows = [
        [one.what, one.figure, one.bar, "met" if one.met else "MISSED"] for one in _others(report)
    ]  # the rest of DESIGN.md section 5
    console.print(_table("Other bars", ("what", "figure", "bar", ""), rows))
    console.print(_table("Measured beside", ("what", "figure"), _measures(report)))
    for result in report.results:
        if result.mergekit_fault:
            console.print(f"{result.method}: mergekit failed: {result.mergekit_fault}", markup=False)
    console.print(summary(report), markup=False)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left")
    for row in rows:
        made.add_row(*(_coloured(cell) for cell in row))
    return made


def _coloured(cell: str) -> str:
    if cell.endswith("MISSED"):
        return f"[red]{cell}[/]"
    return f"[green]{cell}[/]" if cell.endswith("met") else cell


def markdown(report: Report, *, picture: str | None = None) -> str:
    """All of docs/benchmarks.md: tables, the machine described, and a link to the chart where there is one."""
    settings = report.settings
    machine = "\n".join(f"- {name}: {value}" for name, value in report.machine.items())
    others = [[one.what, one.figure, one.bar, "met" if one.met else "MISSED"] for one in _others(report)]
    shown = f"![seconds and peak memory of every method]({picture})\n\n" if picture else ""
    return f"""# Speed and memory of a merge

Made by `examples/bench_merge.py` (`make bench`): {summary(report)}.

Synthetic Llama checkpoints of {settings["parameters"] / 1e6:.0f} M parameters in {settings["tensors"]} tensors,
{settings["dtype"]}; a base and {settings["experts"]} experts. Medians of {settings["rounds"]} rounds in one run, one
more discarded; mergekit: {settings["mergekit_rounds"]}. Engine threads: {settings["threads"]}. All files in the page
cache. *Copy* reads the inputs of that merge in step and writes a new file of the output's size, synced, one
thread, one reused buffer of 1 MiB. *Engine* is `mixmerge.engine.merge.run` on a made plan with imports paid;
*process* is all of `mixmerge merge`. mergekit does not sync what it writes; we do. It runs with
`GOMP_SPINCOUNT=0`, which helps it where cores are shared. Peaks are anonymous and shared memory of the whole
process, the most of all rounds.

{machine}

{shown}{_markdown_table(_HEADINGS, [_row(result) for result in report.results])}

{_markdown_table(("what", "figure", "bar", ""), others)}

{_markdown_table(("measured beside", "figure"), _measures(report))}

mixmerge reads by positions into buffers it keeps, also where a map is faster from a warm cache: a disk error, or a
file that someone cuts short, ends a process that has it mapped (SIGBUS), while a read says which file and byte.
"""


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def chart(report: Report, path: Path) -> None:
    """Bars for every method: seconds on the left, on a logarithmic axis, and peak memory on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [result.method for result in report.results]
    figure, (times, peaks) = pyplot.subplots(
        1, 2, figsize=(13, 1.6 + 0.62 * len(methods)), sharey=True, layout="constrained"
    )
    thickness = 0.8 / len(_SERIES)
    for order, (label, name, colour) in enumerate(_SERIES):
        places = [number + thickness * (order - (len(_SERIES) - 1) / 2) for number in range(len(methods))]
        runs: list[Runs] = [getattr(result, name) for result in report.results]
        _bars(times, places, [one.median or 0 for one in runs], thickness, colour, label, "{:.3g}")
        if name in ("process", "mergekit"):
            sizes = [(one.peak or 0) / 1e6 for one in runs]
            _bars(peaks, places, sizes, thickness, colour, label, "{:,.0f}")
    times.set_yticks(range(len(methods)), methods)
    times.set_ylim(len(methods) - 0.5, -0.5)
    times.set(xscale="log", xlabel="seconds (median)")
    times.margins(x=0.1)
    peaks.set(xlabel="peak memory, MB")
    peaks.margins(x=0.1)
    figure.legend(*times.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(
    axes: Any,
    places: Sequence[float],
    values: Sequence[float],
    thickness: float,
    colour: str,
    label: str,
    form: str,
) -> None:
    drawn = axes.barh(places, values, height=thickness, color=colour, label=label)
    axes.bar_label(drawn, [form.format(value) if value else "" for value in values], fontsize=7, padding=2)
