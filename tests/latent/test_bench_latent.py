"""``examples/bench_latent.py`` on tiny experts: it runs, and its figures and verdicts are what they say.

Nothing here depends on how long anything took.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("bench_latent")


@pytest.mark.slow
def test_it_runs(programs: Any, tmp_path: Path) -> None:
    arguments = (ROOT / "examples" / "bench_latent.py", "--small", "--rounds", 1)
    done = programs(*arguments, folder=tmp_path, environment={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    rows = [
        re.split(r"\s*\|\s*", line.strip("| ")) for line in done.stdout.splitlines() if line.startswith("|")
    ]
    ways = [
        (row[0], row[1]) for row in rows if row[0] in ("primary alone", "prompt", "chunked(32)", "lockstep")
    ]
    assert ways == [
        (way, size) for size in "12" for way in ("primary alone", "prompt", "chunked(32)", "lockstep")
    ]
    assert {row[4] for row in rows if row[0] == "primary alone"} == {"1.000"}
    assert all(float(row[2]) > 0 for row in rows if row[0] == "prompt")
    assert [row[0] for row in rows if "peak" in row[0]] == [
        "largest expert (wide) alone: peak",
        "primary that reads the others: peak",
    ]
    assert [row[0] for row in rows if "prompt" in row[0] and "%" in row[-1]]
    assert {row[0] for row in rows} >= {"one", "joint"}, "logit fusion"


def test_verdicts(bench: Any) -> None:
    assert bench.verdict("prompt", 1, (1.04, 1.10)) == "<= 1.10: met"
    assert bench.verdict("prompt", 1, (1.04, 1.11)) == "<= 1.10: MISSED"
    assert bench.verdict("chunked", 1, (1.16, 1.1)) == "<= 1.15: MISSED"
    assert bench.verdict("prompt", 16, (3.0, 3.0)) == "-"


def test_work_is_counted_by_hand(bench: Any, tmp_path: Path) -> None:
    """Of one token of a prompt: matrices of every bridge that it meets, twice for multiplying and adding."""
    from bench_support import latent

    shapes = {
        name: latent.Shape(16, 4, 2, 2, 16, 260)
        if name == latent.PRIMARY
        else latent.Shape(8, 4, 2, 2, 16, 260)
        for name in (latent.PRIMARY, "peer")
    }
    table = latent.Table(tmp_path, ["some text to learn from, and more of it " * 3], shapes, width=8)
    found = table.work(1)
    assert found.token == 3 * 2 * (16 * 8 + 8 * 8 + 2 * 1 * 8 + 8 * 8 + 8 * 16)
    told = 3 * 2 * (8 * 8 + 2 * 8 * 8)
    assert found.reading == found.token + told
    assert found.forwards == 2 * sum(latent.weights_of(one.model) for one in table.loaded.values())
    assert found.parameters == sum(one.numel() for one in table.glue.parameters())
