"""``examples/bench_route.py`` on few rows: it runs, and its figures and verdicts are what they say.

Nothing here depends on how long anything took.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--rows", "300", "--queries", "500", "--experts", "3", "--dimensions", "8", "--few", "20")
WIDE = {"COLUMNS": "240"}
AT_ONCE = """
import multiprocessing, sys
sys.path.insert(0, sys.argv.pop(1))
import bench_route, typer
context = multiprocessing.get_context
multiprocessing.get_context = lambda method: context("fork")
bench_route.BATCH = 8
typer.run(bench_route.main)
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("bench_route")


@pytest.mark.slow
def test_it_runs(programs: Any, tmp_path: Path) -> None:
    """Its steps are forks of one process, and it embeds 8 texts at once: see the next test for what is left out."""
    options = ("--markdown", "out.md")
    done = programs("-c", AT_ONCE, ROOT / "examples", *SMALL, *options, folder=tmp_path, environment=WIDE)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out.md").read_text(encoding="utf-8")
    for kind in ("knn", "avengers"):
        assert f"| {kind}: 1,000,000 queries x 3 experts |" in written
        assert f"{kind}: load the fitted router" in done.stdout
    assert "from 500 queries" in written
    assert "| knn: recall of the 40 nearest | 1 | at least 0.95 | met | all are compared |" in written
    assert "scikit-learn's brute-force kNN" in written


def test_the_script_and_a_step_of_its_own(bench: Any, programs: Any, tmp_path: Path) -> None:
    done = programs(ROOT / "examples" / "bench_route.py", "--help", folder=tmp_path, environment=WIDE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--markdown" in done.stdout
    found = bench.apart(bench.baseline, "", bench.Sizes(60, 20, 2, 4, 10), tmp_path)
    assert found.keys() == {"seconds"}
    assert found["seconds"] > 0


def test_verdicts(bench: Any) -> None:
    assert bench.Figure("a", 59.9, "s", 60.0).verdict == "met"
    assert bench.Figure("a", 60.0, "s", 60.0).verdict == "MISSED"
    assert bench.Figure("a", 0.94, "", 0.95, least=True).verdict == "MISSED"
    assert bench.Figure("a", 0.95, "", 0.95, least=True).verdict == "met"
    assert bench.Figure("a", float("nan"), "", 0.05).verdict == ""
    assert bench.Figure("a", 1.0, "s").verdict == ""
    assert bench.Figure("a", 59.94, "s", 60.0).cells() == ["a", "59.9 s", "< 60 s", "met", ""]


def test_points_are_of_unit_length_and_differ_by_seed(bench: Any) -> None:
    first, again, other = (bench.points(200, 16, seed=seed) for seed in (1, 1, 2))
    assert np.linalg.norm(first, axis=1) == pytest.approx(np.ones(200), abs=1e-5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_an_encoder_the_share_is_skipped_and_said(bench: Any) -> None:
    one = dict.fromkeys(("seconds", "cpu", "early", "peak", "load", "first", "batch", "alone", "fit"), 1.0)
    found = {"avengers": {**one, "megabytes": 2.0}, "embed": {}, "baseline": {"seconds": 3.0}}
    lines = {line.what: line for line in bench.figures(bench.Sizes(10, 1000, 3, 4, 30), found)}
    share = lines["avengers: time beside MiniLM's, in batches of 256"]
    assert share.cells()[1] == ""
    assert share.verdict == ""
    assert "is not installed" in share.note
    assert lines["avengers: 1,000,000 queries x 3 experts"].value == 1000.0
    assert lines["scikit-learn's brute-force kNN: 1,000,000"].value == pytest.approx(100_000)
    known = {**found, "embed": {"batch": 50.0, "alone": 2.0}}
    lines = {line.what: line for line in bench.figures(bench.Sizes(10, 1000, 3, 4, 30), known)}
    assert lines["avengers: time beside MiniLM's, in batches of 256"].verdict == "met"
    assert lines["avengers: time beside MiniLM's, one by one"].value == 0.5
