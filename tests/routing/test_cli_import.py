"""``mixmerge route import``: somebody's files, and what belongs to them, as one table of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.outcomes import OutcomeTable, Price


@pytest.fixture
def llmrouter(tmp_path: Path) -> Path:
    """LLMRouter's three files, three queries and two experts."""
    texts = ("add 2 and 3", "a rhyme on moon", "loop over a list")
    scored = [{"question": text, "scores": {"small": i / 2, "large": 1.0}} for i, text in enumerate(texts)]
    (tmp_path / "scores.json").write_text(json.dumps(scored), encoding="utf-8")
    known = [
        {"query": text, "task_name": task}
        for text, task in zip(texts, ("sums", "verse", "code"), strict=True)
    ]
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in known), encoding="utf-8"
    )
    prices = {"small": {"size": "7B", "input_price": 0.2, "output_price": 0.3}}
    (tmp_path / "prices.json").write_text(json.dumps(prices), encoding="utf-8")
    (tmp_path / "known.jsonl").write_text('{"prompt": "A  rhyme on moon"}\n', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("out", ["table.parquet", "table.jsonl"])
def test_all_that_belongs_together(llmrouter: Path, route: Callable[..., Any], out: str) -> None:
    options = ("--queries", "queries.jsonl", "--prices", "prices.json", "--leave-out", "known.jsonl")
    shown = route("import", "scores.json", out, *options).stdout.splitlines()
    assert shown[-1] == out
    table = OutcomeTable.read(llmrouter / out)
    assert table.queries == ("add 2 and 3", "loop over a list")
    assert table.metadata["task"] == ("sums", "code")
    assert table.score.tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert table.prices == {"small": Price(0.2, 0.3, 7.0)}


def test_as_json(llmrouter: Path, route: Callable[..., Any]) -> None:
    found = json.loads(route("import", "scores.json", "t.jsonl", "--json").stdout)
    assert found["path"] == "t.jsonl"
    assert found["rows"] == 3


def test_what_is_there_is_kept(llmrouter: Path, fault: Callable[..., str], route: Callable[..., Any]) -> None:
    (llmrouter / "t.jsonl").write_text("mine", encoding="utf-8")
    assert "exists already" in fault("import", "scores.json", "t.jsonl")
    assert (llmrouter / "t.jsonl").read_text() == "mine"
    route("import", "scores.json", "t.jsonl", "--overwrite")
    assert len(OutcomeTable.read(llmrouter / "t.jsonl")) == 3


def test_files_that_do_not_belong(llmrouter: Path, fault: Callable[..., str]) -> None:
    (llmrouter / "long.csv").write_text("query,expert,score\na b,small,1\n", encoding="utf-8")
    assert "takes no file of queries" in fault("import", "long.csv", "t.jsonl", "--queries", "queries.jsonl")
    assert "t.txt" in fault("import", "scores.json", "t.txt")
    assert not (llmrouter / "t.jsonl").exists()
