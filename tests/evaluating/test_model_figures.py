"""Figures of the report of models, worked out by hand from scores row by row."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mixmerge.data.rows import Row, joined
from mixmerge.errors import MixmergeError
from mixmerge.evaluate.advice import Deltas, Facts, advise
from mixmerge.evaluate.leaks import Made
from mixmerge.evaluate.model_entries import named
from mixmerge.evaluate.model_measuring import Judged, info, means_of, measure, spreads_of
from mixmerge.evaluate.model_records import ModelReport, Role
from mixmerge.evaluate.model_report import to_html
from mixmerge.evaluate.model_tables import cells, columns
from mixmerge.evaluate.models import _notes
from mixmerge.evaluate.scoring_tasks import TaskScores
from mixmerge.evaluate.task_file import EvalTask, TaskSpec

TASKS = tuple(
    EvalTask(
        TaskSpec(name=name, data="d", metric="exact", expert=expert, held_out=expert is None),
        tuple(Row(prompt=f"{name} {at}", answer="x") for at in range(4)),
    )
    for name, expert in (("sums", "math"), ("lines", "code"), ("rest", None))
)
SCORES: dict[str, tuple[Role, list[list[float]]]] = {
    "merge": ("merge", [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
    "math": ("expert", [[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]),
    "code": ("expert", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
    "base": ("base", [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]),
}


def _judged(made: Made | None = None) -> list[Judged]:
    return [
        Judged(
            name,
            role,
            {
                task.name: TaskScores(np.array(row, np.float64), 10, 0.5, ("x",) * 4)
                for task, row in zip(TASKS, rows, strict=True)
            },
            made if made is not None and role == "merge" else Made(),
            1_000_000,
        )
        for name, (role, rows) in SCORES.items()
    ]


def _report(**changes: object) -> ModelReport:
    judged = _judged(Made("ties", 0, {"merge_method": "ties", "seed": 0}))
    rows, best = measure(TASKS, judged, means_of(TASKS, judged, resamples=400, seed=0), level=0.95)
    return ModelReport(tuple(map(info, TASKS)), rows, best, (), ("a note",), ("a <warning>",), 0, 400, 0.95)


def test_by_hand() -> None:
    report = _report()
    assert report.best_single == "code"  # 0.5 on average, math 0.375; held-out tasks do not count
    merge, math_, code, base = report.rows
    assert {name: one.value for name, one in merge.scores.items()} == {
        "sums": 0.5,
        "lines": 0.25,
        "rest": 1.0,
    }
    assert merge.average.value == 0.375
    assert merge.held_out is not None
    assert (merge.held_out.value, merge.held_out.low, merge.held_out.high) == (1.0, 1.0, 1.0)
    assert merge.retained["sums"].value == pytest.approx(2 / 3)
    assert merge.retained["lines"].value == 0.25
    assert merge.retained_average is not None
    assert merge.retained_average.value == pytest.approx((2 / 3 + 0.25) / 2)
    assert merge.worst is not None
    assert (merge.worst[0], merge.worst[1].value) == ("lines", 0.25)
    assert merge.over_best is not None
    assert merge.over_best.difference.value == pytest.approx(0.375 - 0.5)
    assert code.over_best is None
    assert math_.retained["sums"].value == 1.0
    assert (math_.retained["sums"].low, math_.retained["sums"].high) == (1.0, 1.0), "itself on the same rows"
    assert base.retained_average is not None
    assert base.retained_average.value == 0.0
    assert merge.speed == pytest.approx(3 * 10 / 1.5)
    assert (merge.method, merge.seed, base.method, base.seed) == ("ties", 0, None, None)


def test_operations_stand_in_table_page_and_json() -> None:
    judged = [dataclasses.replace(one, flops=2.5e9) if one.name == "merge" else one for one in _judged()]
    rows, _ = measure(TASKS, judged, means_of(TASKS, judged, resamples=100, seed=0), level=0.95)
    report = dataclasses.replace(_report(), rows=rows)
    at = columns(report).index("GFLOPs/token")
    assert [cells(report, row)[at] for row in rows] == ["2.5", "-", "-", "-"]
    assert "GFLOPs/token" in to_html(report)
    found = json.loads(json.dumps(report.as_dict()))["rows"]
    assert [row["flops"] for row in found] == [2.5e9, None, None, None]


def test_intervals_hold_the_value_and_do_not_depend_on_the_order() -> None:
    judged = _judged()
    forward = means_of(TASKS, judged, resamples=300, seed=3)
    backward = means_of(TASKS[::-1], judged[::-1], resamples=300, seed=3)
    assert np.array_equal(forward.drawn, backward.drawn[:, ::-1, ::-1])
    other = means_of(TASKS, judged, resamples=300, seed=4)
    assert not np.array_equal(forward.drawn, other.drawn)
    for row in measure(TASKS, judged, forward, level=0.9)[0]:
        assert row.average.low <= row.average.value <= row.average.high
    # Tasks are drawn apart: what is drawn of one says nothing of another.
    assert not np.array_equal(forward.drawn[:, 0, 0], forward.drawn[:, 1, 0])


def test_without_experts_there_is_nothing_to_retain() -> None:
    judged = [one for one in _judged() if one.role != "expert"]
    rows, best = measure(TASKS, judged, means_of(TASKS, judged, resamples=100, seed=0), level=0.95)
    assert best is None
    assert [row.retained for row in rows] == [{}, {}]
    assert rows[0].worst is None
    assert rows[0].over_best is None


def test_an_expert_that_scores_nothing_has_no_share() -> None:
    judged = _judged()
    judged[1].answers["sums"].scores[:] = 0
    rows, _ = measure(TASKS, judged, means_of(TASKS, judged, resamples=100, seed=0), level=0.95)
    assert set(rows[0].retained) == {"lines"}


def test_notes_say_why_no_share_is_retained_and_who_knows_the_task() -> None:
    judged = _judged()
    judged[1].answers["sums"].scores[:] = 0
    found = " ".join(_notes(TASKS, judged, "code"))
    assert "No share is retained of sums: its own expert scores nothing." in found
    assert "No share is retained of lines" not in found
    assert "told which task" not in found
    rows = tuple(Row(text=f"a {at}", label=0) for at in range(4))
    moods = EvalTask(TaskSpec(name="mood", data="d", metric="accuracy", head="a"), rows)
    assert "by the head, in mood." in " ".join(_notes((moods,), [], None))


def test_seeds() -> None:
    made = [Made("dare_ties", seed, {"merge_method": "dare_ties", "seed": seed}) for seed in (0, 1)]
    other = Made("dare_ties", 2, {"merge_method": "dare_ties", "seed": 2, "dtype": "float32"})
    judged = [
        Judged(name, "merge", {"sums": TaskScores(np.array(row), 1, 1.0, ("",) * 4)}, one, 1)
        for name, row, one in (
            ("a", [1.0, 1.0, 0.0, 0.0], made[0]),
            ("b", [1.0, 0.0, 0.0, 0.0], made[1]),
            ("c", [0.0, 0.0, 0.0, 0.0], other),
        )
    ]
    rows, _ = measure(TASKS[:1], judged, means_of(TASKS[:1], judged, resamples=100, seed=0), level=0.95)
    (found,) = spreads_of(rows, {one.name: one.made for one in judged})
    assert (found.models, found.seeds, found.mean, found.low, found.high) == (
        ("a", "b"),
        (0, 1),
        *(0.375, 0.25, 0.5),
    )
    assert found.deviation == pytest.approx(math.sqrt(2 * 0.125**2))


def test_report_for_people_and_programs(tmp_path: Path) -> None:
    from rich.console import Console

    report = _report()
    with (console := Console(width=220)).capture() as capture:
        console.print(report.render())
    line = next(line for line in capture.get().splitlines() if line.startswith("│ merge"))
    for word in ("50.0 (67%)", "25.0 (25%)", "45.8%", "lines 25.0%", "1.0 MB", "20"):
        assert word in line
    data = json.loads(json.dumps(report.as_dict()))
    assert data["rows"][0]["worst"][0] == "lines"
    assert data["rows"][0]["retained"]["lines"]["value"] == 0.25
    assert "answers" not in data["rows"][0]
    page = to_html(report, title="A & B")
    assert "A &amp; B" in page
    assert "a &lt;warning&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    report.write_html(tmp_path / "r.html")
    report.write_jsonl(tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 3 * 4
    assert lines[0] == {"model": "merge", "task": "sums", "row": 0, "score": 1.0, "given": "x"}
    with pytest.raises(MixmergeError, match="exists already"):
        report.write_html(tmp_path / "r.html")
    with pytest.raises(MixmergeError, match="no row 'x'"):
        report.row("x")


DELTAS = Deltas((0.1, 0.1), (0.001, 0.001), 0.05, 0.48, 0.5, 10_000, False)
HERE = frozenset({"linear", "ties", "tsv_m", "iso_c", "regmean", "expert_merging"})


def _texts(deltas: Deltas | None, *, data: bool = False, methods: frozenset[str] = HERE) -> list[str]:
    return [f"{one.text} {one.why}" for one in advise(Facts(_report(), deltas, data, methods))]


def test_advice() -> None:
    first, second, *_ = _texts(DELTAS)
    assert first.startswith("Do no harm: serve code")
    assert "0.125 below code" in first
    assert second.startswith("Give code, the expert of lines, more weight")
    assert any(one.startswith("Without data, try tsv_m or iso_c.") for one in _texts(DELTAS))
    only = _texts(DELTAS, methods=frozenset({"linear", "ties"}))
    assert not any("Without data" in one for one in only), "ties was tried, and no other is here"
    assert any(
        one.startswith("Use your data: try regmean or expert_merging.") for one in _texts(DELTAS, data=True)
    )
    more = HERE | {"learned_spectrum"}
    assert any("try regmean or learned_spectrum" in one for one in _texts(DELTAS, data=True, methods=more))
    far = Deltas((0.9, 0.1), (0.02, 0.001), 0.05, 0.48, 0.5, 10_000, False)
    assert any(one.startswith("Do not drop entries at random") for one in _texts(far))
    assert any("9.0 times the smallest" in one for one in _texts(far))
    alike = Deltas((0.1, 0.1), (0.001, 0.001), 0.8, 0.1, 0.5, 10_000, False)
    assert any(one.startswith("Average: linear") for one in _texts(alike))
    adapters = Deltas((0.1, 0.1), (0.001, 0.001), 0.05, 0.48, 0.5, 10_000, True)
    assert any("LoRA adapters" in one for one in _texts(adapters))
    big = Deltas((0.1, 0.1), (0.001, 0.001), None, 0.0, 0.5, 24_000_000_000, False)
    assert any("24 billion parameters" in one for one in _texts(big))
    assert all(one.source for one in advise(Facts(_report(), DELTAS, True, HERE)))
    assert len(_texts(far, data=True)) <= 4


def test_advice_does_not_contradict_itself_or_the_figures() -> None:
    alike = Deltas((0.1, 0.1), (0.001, 0.001), 0.8, 0.1, 0.5, 10_000, False)
    every = HERE | {"slerp", "task_arithmetic"}
    assert any(one.startswith("Average: linear or slerp.") for one in _texts(alike, methods=every))
    three = dataclasses.replace(alike, relative=(0.1,) * 3, spread=(0.001,) * 3)
    assert any(one.startswith("Average: linear.") for one in _texts(three, methods=every)), "slerp takes two"
    assert not any("Average" in one for one in _texts(alike, methods=frozenset({"ties"}))), "ties was tried"
    adapters = dataclasses.replace(alike, lora=True)
    assert not any(one.startswith("Try ") for one in _texts(adapters)), "averaging is what it says of them"

    def of(merge: list[list[float]], *, method: str = "ties") -> list[str]:
        judged = _judged(Made(method, 0, {"merge_method": method, "seed": 0}))
        for task, row in zip(TASKS, merge, strict=True):
            judged[0].answers[task.name].scores[:] = row
        rows, best = measure(TASKS, judged, means_of(TASKS, judged, resamples=100, seed=0), level=0.95)
        report = ModelReport(tuple(map(info, TASKS)), rows, best, (), (), (), 0, 100, 0.95)
        return [one.text for one in advise(Facts(report, DELTAS, True, HERE))]

    whole = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert of(whole) == ["Stop here: merge keeps what its experts know."], "nothing to try behind that"
    tie = of([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert not any(one.startswith("Do no harm") for one in tie), "0.5, as the best expert has"
    SCORES["base"][1][2][:] = [1, 1, 1, 1]
    try:
        low = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
        assert any(one.startswith("Lower lambda") for one in of(low))
        assert not any(one.startswith("Lower lambda") for one in of(low, method="linear")), "it has none"
    finally:
        SCORES["base"][1][2][:] = [1, 0, 0, 0]


def test_a_merge_that_keeps_everything_is_enough() -> None:
    judged = _judged()
    for name, expert in (("sums", 1), ("lines", 2)):
        judged[0].answers[name].scores[:] = judged[expert].answers[name].scores
    rows, best = measure(TASKS, judged, means_of(TASKS, judged, resamples=100, seed=0), level=0.95)
    report = ModelReport(tuple(map(info, TASKS)), rows, best, (), (), (), 0, 100, 0.95)
    assert [one.text for one in advise(Facts(report, None, False, HERE))] == [
        "Stop here: merge keeps what its experts know."
    ]


def test_names() -> None:
    assert named(["a/math", "b/code"], where="m") == {"math": "a/math", "code": "b/code"}
    assert named(["a/x", "b/x"], where="m") == {"a/x": "a/x", "b/x": "b/x"}
    assert named(["base+ads/math"], where="m") == {"math": "base+ads/math"}
    with pytest.raises(MixmergeError, match="is given twice"):
        named(["a", "a"], where="m")


def test_joined() -> None:
    assert [joined("1 + 1 =", "2"), joined("1 + 1 = ", "2"), joined("a", " b"), joined("", "b")] == [
        *(" 2", "2", " b", "b")
    ]
