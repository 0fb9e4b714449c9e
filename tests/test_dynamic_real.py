"""The example on twins and gates, in small: tables from scores that are there, and the recipes it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "examples")


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Scores of two tasks as merge_real and dynamic_real leave them."""
    folder = tmp_path / "encoders"
    for place in ("results", "twins"):
        (folder / place).mkdir(parents=True)
    right = {"one": [True] * 90 + [False] * 10, "two": [True] * 80 + [False] * 20}
    half = {"one": [True] * 60 + [False] * 40, "two": [True] * 50 + [False] * 50}
    good = {"one": [True] * 88 + [False] * 12, "two": [True] * 78 + [False] * 22}
    (folder / "test-experts.json").write_text(json.dumps({"right": right}))
    (folder / "results" / "tsv-m--1-seed0.json").write_text(json.dumps({"right": half}))
    twin = {"storage": 10, "experts": 100, "speed": {"shared": 200.0, "mixture": 100.0}}
    for rank, own in ((4, half), (16, good)):
        made = {**twin, "own": own, "oracle": right}
        (folder / "twins" / f"iso-c--rank-{rank}.json").write_text(json.dumps(made))
    return tmp_path


def test_the_table_and_the_bar_by_hand(scored: Path) -> None:
    from dynamic_support.page import twins_text

    text = twins_text(scored, "encoders")
    assert "the best static merge on the same test rows is TSV-M, 1, 55.0%" in text
    row = next(line for line in text.splitlines() if line.startswith("| iso-c--rank-16, own router"))
    assert "| 88.0% | 78.0% | 83.0% |" in row
    assert "93%" in row  # (83 - 55) / (85 - 55)
    assert "= 10.0%" in row
    assert row.endswith("| 100 of 200 |")
    assert text.index("| experts, each on its own task |") < text.index("| TSV-M, 1 |")
    bars = [line for line in text.splitlines() if line.startswith("- iso-c")]
    assert [line.endswith(": met") for line in bars] == [True, False]
    assert twins_text(scored, "generative") == "not run yet\n"


def test_the_figure_is_drawn(scored: Path, tmp_path: Path) -> None:
    from dynamic_support.page import draw_ranks

    draw_ranks(scored, tmp_path / "figures" / "ranks.png")
    assert (tmp_path / "figures" / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_twin_of_the_zoo_is_merged_and_scored(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamic_support import small
    from dynamic_support.page import twins_text
    from dynamic_support.twins import Twin, best_static, run_twin
    from merging_support.entries import ENTRIES
    from merging_support.suites import run_entry

    from mixmerge.errors import MixmergeError
    from mixmerge.zoo import Zoo

    monkeypatch.setattr(small, "TEST", slice(0, 4))
    monkeypatch.setattr(small, "VALIDATION", slice(4, 6))
    suite = small.open_small(tmp_path, Zoo.open(zoo))
    with pytest.raises(MixmergeError, match="no static merge has been scored"):
        best_static(suite)
    (tsv,) = [entry for entry in ENTRIES if entry.name == "TSV-M"]
    run_entry(suite, replace(tsv, sweep=("lambda", (1.0,))))
    shared = best_static(suite)
    assert shared["merge_method"] == "tsv_m"
    run_twin(suite, Twin("tsv_m, rank 4", shared, rank=4, gate={"epochs": 1}))
    found = json.loads((tmp_path / "small" / "twins" / "tsv-m--rank-4.json").read_text())
    assert {task: len(right) for task, right in found["own"].items()} == dict.fromkeys(suite.experts, 4)
    text = twins_text(tmp_path, "small")
    assert "| TSV-M |" in text, "the shared part"
    assert "| tsv-m--rank-4, told the task |" in text


@pytest.mark.slow
def test_gates_are_fitted_and_scored_on_a_zoo(zoo: Path, tmp_path: Path) -> None:
    from dynamic_support.gates import GateRow, mixture, run_one

    from mixmerge.mixture import read
    from mixmerge.zoo import Zoo

    made, row = Zoo.open(zoo), GateRow("mean", "mean")
    task = made.tasks[0]
    assert read(mixture(made, row, list(made.tasks))).mixture is not None
    run_one(made, row, task, tmp_path / "mean.json", asked=4)
    found = json.loads((tmp_path / "mean.json").read_text())
    assert len(found["right"][task]) == len(found["base"][task]) == 4
