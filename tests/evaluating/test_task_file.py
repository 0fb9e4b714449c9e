"""Tasks files: what they may say, and every fault with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixmerge.errors import MixmergeError
from mixmerge.evaluate.task_file import one_task, read_tasks


def _rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _faults(source: Any) -> list[str]:
    with pytest.raises(MixmergeError) as caught:
        read_tasks(source)
    return [str(fault) for fault in caught.value.faults]


def test_a_file(tmp_path: Path) -> None:
    _rows(tmp_path / "sums.jsonl", [{"prompt": f"1 + {n} =", "answer": str(1 + n)} for n in range(5)])
    _rows(tmp_path / "pick.jsonl", [{"prompt": "1 + 1 =", "choices": ["2", "3"], "label": 0}])
    file = tmp_path / "tasks.yaml"
    file.write_text(
        "tasks:\n"
        "- {name: sums, data: sums.jsonl, metric: exact, expert: math, limit: 3, stop: [';']}\n"
        "- {name: pick, data: pick.jsonl, metric: choice, held_out: true, normalise: none}\n"
    )
    sums, pick = read_tasks(file)
    assert [row.answer for row in sums.rows] == ["1", "2", "3"]
    assert (sums.spec.expert, sums.tokens, sums.spec.stop) == ("math", 64, (";",))
    assert (pick.spec.held_out, pick.spec.normalise, pick.rows[0].label) == (True, "none", 0)
    assert len(read_tasks(file, limit=2)[0].rows) == 2
    assert [task.name for task in read_tasks(file, names=("pick",))] == ["pick"]


def test_columns_with_other_names(tmp_path: Path) -> None:
    data = _rows(
        tmp_path / "q.jsonl",
        [
            {"question": "1 + 1 =", "result": "2", "prompt": "not this"},
            {"question": "2 + 2 =", "result": "4"},
        ],
    )
    task = {
        "name": "q",
        "data": str(data),
        "metric": "exact",
        "fields": {"prompt": "question", "answer": "result"},
    }
    (read,) = read_tasks({"tasks": [task]})
    assert [(row.prompt, row.answer) for row in read.rows] == [("1 + 1 =", "2"), ("2 + 2 =", "4")]
    _rows(data, [{"question": "1", "result": "2"}, {"question": 5, "result": "2"}])
    (fault,) = _faults({"tasks": [task]})
    assert fault.startswith(f"task q: {data}, line 2, prompt: is 5")
    data.write_text('{"question": "1", "result": "2"}\n5\n{broken\n')
    for limit in ({}, {"limit": 2}):
        first, *more = _faults({"tasks": [{**task, **limit}]})
        assert first.startswith(f"task q: {data}, line 2: is no mapping")
        assert ["line 3: is not JSON" in fault for fault in more] == [True] * (not limit)


def test_faults_are_told_at_once(tmp_path: Path) -> None:
    data = str(_rows(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}]))
    tasks = [
        {"name": "a", "data": data, "metric": "exakt"},
        {"name": "b", "data": data, "metric": "accuracy"},
        {"name": "c", "data": data, "metric": "exact", "head": "x"},
        {"name": "c", "data": data, "metric": "exact", "held_out": True, "expert": "e"},
        {"name": "d", "data": data, "metric": "f1", "extract": "number"},
        {"name": "e", "data": data, "metric": "exact", "fields": {"promt": "q"}},
        {"name": "f", "data": data, "metric": "exact", "max_new_tokens": 0},
        {"name": "g", "data": data, "metrik": "exact"},
    ]
    found = "\n".join(_faults({"tasks": tasks}))
    for word in (
        "no metric is called 'exakt'. Did you mean 'exact'?",
        "accuracy takes a head",
        "exact takes no head",
        "a second task is called 'c'",
        "is held out and has an expert",
        "extract goes with the metric exact",
        "fields has no column 'promt'. Did you mean 'prompt'?",
        "greater than or equal to 1",
        "unknown key 'metrik'",
        "the key metric is missing",
    ):
        assert word in found


@pytest.mark.parametrize(
    ("metric", "row", "word"),
    [
        ("exact", {"prompt": "a"}, "has no answer"),
        ("exact", {"text": "a"}, "has no prompt"),
        ("exact", {"prompt": "a", "answer": "b\nc"}, "its answer has several lines"),
        ("choice", {"prompt": "a", "answer": "b"}, "has no choices"),
        ("choice", {"prompt": "a", "choices": ["b", "c"]}, "has no label"),
        ("pass@1", {"prompt": "a"}, "has no answer"),
        ("pass@1", {"prompt": "a", "answer": " \n"}, "has no tests"),
    ],
)
def test_rows_that_a_metric_cannot_score(metric: str, row: dict[str, Any], word: str, tmp_path: Path) -> None:
    data = _rows(tmp_path / "d.jsonl", [{"id": "one", **row}] * 30)
    with pytest.raises(MixmergeError) as caught:
        read_tasks(one_task(str(data), metric))
    assert str(caught.value.faults[0]).startswith(f"task d: row one: {word}")
    assert len(caught.value.faults) == 21
    assert "10 more rows are like these" in str(caught.value.faults[-1])


def test_an_answer_that_nothing_can_equal(tmp_path: Path) -> None:
    data = _rows(
        tmp_path / "d.jsonl", [{"prompt": "a", "answer": "so it is 4"}, {"prompt": "a", "answer": "four"}]
    )
    task = {"name": "d", "data": str(data), "metric": "exact", "extract": "number"}
    assert _faults({"tasks": [task]}) == [
        "task d: row 2: its answer holds no number. Else no answer to it can be right."
    ]


def test_all_lines_of_an_answer_are_compared_where_that_is_said(tmp_path: Path) -> None:
    data = _rows(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b\nc"}])
    task = {"name": "d", "data": str(data), "metric": "exact", "extract": "whole"}
    assert read_tasks({"tasks": [task]})[0].rows[0].answer == "b\nc"
    assert len(read_tasks(one_task(str(data), "f1"))[0].rows) == 1


def test_what_is_no_tasks_file(tmp_path: Path) -> None:
    assert "cannot read the tasks file" in _faults(tmp_path / "none.yaml")[0]
    assert "expected a list of tasks" in _faults({"tasks": []})[0]
    assert "unknown key 'task'" in _faults({"task": []})[0]
    missing = {"tasks": [{"name": "a", "data": str(tmp_path / "gone.jsonl"), "metric": "exact"}]}
    assert "task a" in _faults(missing)[0]
    assert "does not exist" in _faults(missing)[0]
