"""The report: reads the scores of both suites and writes their tables."""

from __future__ import annotations

import json
from pathlib import Path

from merging_support.entries import ENTRIES, SEEDS, Entry
from merging_support.fusion import read
from merging_support.suites import slug
from merging_support.table import Result, against_table, recall_table, recovery, result_from, scores_table

START = "task arithmetic"  # the row that the gap is measured from
BY_ENTROPY = ("task arithmetic, 0.3", "AdaMerging, layers", "AdaMerging, layers, transductive", "DOGE-AM")
FEW = 4  # classes of a task whose recalls are shown


def results_of(folder: Path, entry: Entry) -> Result | None:
    """The row of an entry, if it has been run."""
    files = [folder / "results" / f"{slug(entry.name)}-seed{seed}.json" for seed in SEEDS]
    found = [read(file) for file in files if file.exists()]
    theirs = folder / "fusionbench" / f"{slug(entry.name)}.json"
    if not found:
        return None
    if entry.sweep and found[0].get("value") is not None:
        found[0]["note"] = f"{entry.sweep[0]} {found[0]['value']:g}"
    return result_from(entry.name, found, read(theirs) if theirs.exists() else None)


def report_text(work: Path, suite: str) -> str:
    """Markdown of one suite: the table, FusionBench beside ours, and whether the expected order holds."""
    folder = work / suite
    if not (folder / "test-experts.json").exists():
        return "not run yet\n"
    own = read(folder / "test-experts.json")["right"]
    experts = {task: sum(right) / len(right) for task, right in own.items()}
    results = [Result("base", (read(folder / "test-base.json")["right"],))]
    results += [row for entry in ENTRIES if suite in entry.suites and (row := results_of(folder, entry))]
    by_name = {result.name: result for result in results}
    start = by_name[START].average() if START in by_name else float("nan")
    ceiling = sum(experts.values()) / len(experts)
    lines = [
        f"Experts {ceiling:.1%}, best task arithmetic {start:.1%}: a gap of {100 * (ceiling - start):.1f} points.",
        "",
        scores_table(results, experts, start, kind="method"),
    ]
    if any(result.against for result in results):
        lines.append(against_table(results))
    lines.append(order_text(by_name, start, ceiling))
    shown = [by_name[name] for name in BY_ENTROPY if name in by_name]
    lines += [recalls_text(work / "data" / task, task, shown) for task in experts if len(shown) > 1]
    return "\n".join(lines)


def recalls_text(data: Path, task: str, results: list[Result]) -> str:
    """What learning by entropy does to each class, where there are few: it confirms what the merge says already."""
    classes = read(data / "classes.json")
    if len(classes) > FEW:
        return ""
    rows = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return recall_table(results, task, [json.loads(row)["label"] for row in rows], classes)


def order_text(results: dict[str, Result], start: float, ceiling: float) -> str:
    """Whether what the literature expects holds here: pairs of rows, the better one first."""
    pairs = (
        ("AdaMerging, layers", "AdaMerging, tasks"),
        ("AdaMerging, tasks", "task arithmetic, 0.3"),
        ("AdaMerging, layers, transductive", "AdaMerging, layers"),
        ("DOGE-AM", "DOGE-TA"),
        ("Expert Merging", "task arithmetic, 0.3"),
        ("RegMean", "Fisher"),
        ("TSV-M", "task arithmetic"),
    )
    lines = []
    for better, worse in pairs:
        if better in results and worse in results:
            one, two = (recovery(results[name].average(), start, ceiling) for name in (better, worse))
            lines.append(
                f"- {better} above {worse}: {'yes' if one > two else 'NO'} ({one:.0%} and {two:.0%} of the gap)"
            )
    return "\n".join(lines) + ("\n" if lines else "")


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` of a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise SystemExit(f"{page}: has no <!-- {name} --> ... <!-- /{name} -->")
    page.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")
