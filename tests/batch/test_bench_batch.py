"""``examples/bench_batch.py`` on few queries: it runs, and its figures and verdicts are what they say.

Nothing here depends on how long anything took.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--experts", "3", "--queries", "9", "--naive", "3", "--lines", "300")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("bench_batch")


@pytest.mark.slow
def test_it_runs(family: Callable[..., Any], programs: Any, tmp_path: Path) -> None:
    model = family("llama").base
    arguments = (ROOT / "examples" / "bench_batch.py", "--model", model, *SMALL, "--markdown", "out.md")
    done = programs(*arguments, folder=tmp_path, environment={"COLUMNS": "240"})
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "3 experts, 9 queries" in written
    assert "| loads | 3 | at most 3 | met | one for each expert and device |" in written
    assert "if only loads cost, 3: queries / experts" in written
    assert "300 lines, an expert that answers at once" in done.stdout
    assert "memory of that above 30 lines" in done.stdout


def test_verdicts(bench: Any) -> None:
    assert bench.Figure("a", 4.9, "s", 5.0).cells() == ["a", "4.9 s", "at most 5 s", "met", ""]
    assert bench.Figure("a", 5.1, "", 5.0).cells()[3] == "MISSED"
    assert bench.Figure("a", 5.1, "", 5.0, least=True).cells()[2:4] == ["at least 5", "met"]
    assert bench.Figure("a", 4.9, "", 5.0, least=True).cells()[3] == "MISSED"
    assert bench.Figure("a", 1234.5, "s", note="n").cells() == ["a", "1,234 s", "", "", "n"]


def test_time_in_which_two_are_at_work_counts_once(bench: Any) -> None:
    clock = bench.Clock(
        [("load", 0.0, 2.0), ("load", 3.0, 4.0), ("generate", 1.0, 3.5), ("generate", 6.0, 7.0)]
    )
    assert (clock.total("load"), clock.total("generate")) == (3.0, 3.5)
    assert clock.first("load") == 2.0
    assert clock.busy() == 5.0


def test_each_query_goes_to_another_expert(bench: Any, tmp_path: Path) -> None:
    from mixmerge.batch.lines import Input
    from mixmerge.experts import Expert, ExpertSet

    experts = ExpertSet(tuple(Expert(f"expert-{n:02d}", "echo", engine="echo") for n in range(3)))
    bench.requests(tmp_path / "in.jsonl", experts, 7)
    source = Input.open(tmp_path / "in.jsonl", experts=experts.names, mixture_name="bench")
    asked = [line.item for line in source.scan()]
    assert [one.expert for one in asked if one] == [experts.names[n % 3] for n in range(7)]
