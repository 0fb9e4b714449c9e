"""What a merge that looks at data tells while it does: steps of every stage, bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixmerge.engine.merge import merge

ROWS = {
    "expert0": ["the quick brown fox", "jumps over", "a lazy dog"],
    "expert1": ["1 + 2 = 3", "4 * 5 = 20"],
}


def recipe(method: str, made: Any, folder: Path, **calibration: Any) -> dict[str, Any]:
    for name, lines in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = {name: str(folder / f"{name}.jsonl") for name in ROWS}
    return {
        "merge_method": method,
        "base_model": str(made.base),
        "models": [{"model": str(path)} for path in made.experts[:2]],
        "calibration": {"per_expert": data, "batch_size": 1, **calibration},
        "dtype": "float32",
    }


@pytest.mark.parametrize("method", ["regmean", "fisher", "activation_ties"])
def test_rows_are_told_as_they_are_gathered(method: str, family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    written = recipe(method, made, tmp_path)
    if method != "activation_ties":
        del written["base_model"]
    told: list[tuple[str, int, int]] = []
    merge(written, tmp_path / "out", gathering=lambda *step: told.append(step))
    assert list(dict.fromkeys(told)) == [
        *((str(made.experts[0]), done, 5) for done in (1, 2, 3)),
        *((str(made.experts[1]), done, 5) for done in (4, 5)),
    ]


def test_blocks_are_told_where_all_experts_go_together(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    written = recipe("regmean_plus", made, tmp_path)
    del written["base_model"]
    told: list[tuple[str, int, int]] = []
    merge(written, tmp_path / "out", gathering=lambda *step: told.append(step))
    blocks = told[-1][2]
    assert blocks > 1
    assert told == [("all experts", done, blocks) for done in range(1, blocks + 1)]


@pytest.mark.slow
def test_bars_on_a_terminal_only(family: Callable[..., Any], tmp_path: Path, on_a_terminal: Any) -> None:
    made = family("llama", dtype="float32")
    written = recipe("regmean", made, tmp_path)
    del written["base_model"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(written))
    command = [sys.executable, "-P", "-m", "mixmerge", "merge", "r.yaml", "out", "--overwrite"]
    _, shown = on_a_terminal(tmp_path, command)
    assert "gathering" in shown
    assert shown.rindex("gathering") < shown.index("merging")  # one after the other
    assert "gathering" not in on_a_terminal(tmp_path, [*command, "-q"])[1]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "gathering" not in piped.stderr
