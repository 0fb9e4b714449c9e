"""``mixmerge eval``: what goes to stdout, files, faults in a line with exit code 2."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixmerge.cli import app


@pytest.fixture
def run(family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``run(*arguments, code=0)`` in a folder with ``base``, ``expert0``, ``q.jsonl`` and ``tasks.yaml``."""
    found = family("llama", dtype="float32")
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(found.base)
    Path("expert0").symlink_to(found.experts[0])
    Path("expert1").symlink_to(found.experts[1])
    rows = [{"prompt": f"{n} + 1 =", "choices": ["a", "b"], "label": n % 2} for n in range(4)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks.yaml").write_text(
        "tasks:\n- {name: q, data: q.jsonl, metric: choice, expert: one}\n"
        "- {name: new, data: q.jsonl, metric: exact, held_out: true, max_new_tokens: 2}\n"
    )

    def invoke(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    return invoke


COMMON = (
    "--tasks",
    "tasks.yaml",
    "--experts",
    "one=expert0,two=expert1",
    "--base",
    "base",
    "--resamples",
    100,
)


def test_a_table(run: Callable[..., Any]) -> None:
    result = run("mine=expert1", *COMMON, "--recommend", "--html", "r.html", "--answers", "a.jsonl")
    lines = result.stdout.splitlines()
    assert any(line.startswith("│ mine") for line in lines)
    assert any("new (held out)" in line for line in lines)
    assert any(line.startswith("next 1: ") and "(source: " in line for line in lines)
    assert "warning: fewer than 30 rows" in result.stderr
    page = Path("r.html").read_text()
    assert "What to try next" in page
    assert "<script" not in page
    assert len(Path("a.jsonl").read_text().splitlines()) == 4 * 2 * 4


def test_all_faults_of_the_inputs_at_once(run: Callable[..., Any]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a"}\n')
    result = run("gone", "--task", "bad.jsonl", "--metric", "exact", "--experts", "x=lost", code=2)
    assert [line.split()[1] for line in result.stderr.splitlines()] == ["task", "model:", "experts:"]


def test_a_page_that_cannot_be_drawn_is_told_first(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("gone", "--tasks", "none.yaml", "--html", "r.html", code=2)
    assert "plots: need matplotlib" in result.stderr


def test_a_full_disk_leaves_the_figures(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mixmerge.outcomes.whole.os.fsync", full)
    task = ("--task", "q.jsonl", "--metric", "choice", "--resamples", 100, "--limit", 3)
    result = run("base", *task, "--answers", "a.jsonl", code=2)
    assert "a.jsonl: cannot be written: No space left on device" in result.stderr
    assert "average" in result.stdout
    assert not Path("a.jsonl").exists()


def test_json_and_one_task(run: Callable[..., Any]) -> None:
    result = run(
        "base", "--task", "q.jsonl", "--metric", "choice", "--json", "--resamples", 100, "--limit", 3, "-q"
    )
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert found["tasks"] == [{"name": "q", "metric": "choice", "rows": 3, "expert": None, "held_out": False}]
    assert [row["name"] for row in found["rows"]] == ["base"]
    assert found["best_single"] is None
    assert 0 <= found["rows"][0]["average"]["value"] <= 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("base",), "--tasks: is missing"),
        (("base", "--task", "q.jsonl"), "--task: needs a metric"),
        (("base", "--metric", "exact", "--tasks", "tasks.yaml"), "--metric: goes with --task"),
        (("base", "--task", "q.jsonl", "--tasks", "tasks.yaml"), "--task: stands beside --tasks"),
        (("base", "--task", "q.jsonl", "--metric", "exakt"), "Did you mean 'exact'?"),
        (("base", "--tasks", "none.yaml"), "none.yaml: cannot read the tasks file"),
        (("gone", "--tasks", "tasks.yaml"), "gone"),
        (("=base", "--tasks", "tasks.yaml"), "MODEL: is '=base'"),
        (("a=base", "a=expert0", "--tasks", "tasks.yaml"), "two are called 'a'"),
        (("base", *COMMON), "two are called 'base'"),
        (("m=base", "--tasks", "tasks.yaml", "--experts", "won=expert0"), "its expert 'one' is not among"),
        (("m=base", "--tasks", "tasks.yaml", "--recommend"), "--recommend: needs the experts"),
        (("m=base", "--tasks", "tasks.yaml", "--calibration", "q.jsonl"), "--calibration: goes with"),
        (("m=base", *COMMON, "--recommend", "--calibration", "q.jsonl"), "4 of its rows are rows of task q"),
        (("m=base", "--tasks", "tasks.yaml", "--dtype", "float33"), "Did you mean 'float32'?"),
        (("m=base", "--tasks", "tasks.yaml", "--html", "q.jsonl"), "q.jsonl: exists already"),
        (("m=base", "--tasks", "tasks.yaml", "--answers", "q.jsonl/a.jsonl"), "q.jsonl is no folder"),
        (
            ("m=base", "--tasks", "tasks.yaml", "--answers", "a" * 300),
            "cannot be written: File name too long",
        ),
        (("m=base", "--tasks", "tasks.yaml", "--resamples", "5"), "resamples: is 5"),
        (("m=base", "--tasks", "tasks.yaml", "--program-seconds", "0"), "limits: seconds: is 0"),
        (
            ("m=base", "--tasks", "tasks.yaml", "--lm-eval-path", "."),
            "--lm-eval-path: is given without tasks",
        ),
        (("m=base", "--lm-eval", "x", "--lm-eval-path", "gone"), "gone is no folder"),
    ],
)
def test_faults(run: Callable[..., Any], arguments: tuple[object, ...], word: str) -> None:
    result = run(*arguments, code=2)
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())
    assert result.stdout == ""
