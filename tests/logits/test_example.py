"""``examples/logit_fusion.py`` and the measure of its search: they run, and say what they did."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_the_example_runs(programs: Any, tmp_path: Path) -> None:
    done = programs(ROOT / "examples" / "logit_fusion.py", "--effort", "0.01", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "large base alone",
        "the best alpha of 8",
        "matched, all experts jointly",
        "capitals and a dot",
    ):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_search_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    fusion = importlib.import_module("bench_support.fusion")
    rows = fusion.fusion_rows(rows=(2,), rounds=2, small=True)
    assert [(one.mode, one.experts) for one in rows] == [("one", 1), ("joint", 2)]
    assert all(one.evaluations <= fusion.MOST for one in rows)
    assert all(one.share >= 0 for one in rows)
    assert "% of the step" in str(rows[0])
