"""Statistics and a real ``kill -9``: what was whole is used again, the rest is gathered anew, and nothing differs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.engine import merge as engine
from mixmerge.engine.calibrating import cache_folder
from mixmerge.engine.merge import merge

TEXTS = {
    "expert0": ["the quick brown fox", "jumps over", "a lazy dog and 12 more of them"],
    "expert1": ["1 + 2 = 3", "4 * 5 = 20, so 20 / 5 = 4", "7 - 7 = 0"],
}
# Dies when an expert (or, block by block, all) has been told of so often; or when a second file of facts is opened.
DYING = """
import json, os, signal, sys
from mixmerge.engine.merge import merge

recipe, out, at = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
seen = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def gathering(expert, done, total):
    seen.append(expert)
    if at != "writing" and seen.count(seen[-1]) == at[1] and len(set(seen)) == at[0]:
        die()

def audit(event, arguments):
    if event == "open" and at == "writing" and str(arguments[0]).endswith("statistics.json") and arguments[1] == "w":
        opened.append(arguments[0])
        if len(opened) == 2:
            die()

opened = []
sys.addaudithook(audit)
merge(recipe, out, gathering=gathering)
"""


def recipe(made: Any, method: str, folder: Path, rows: dict[str, list[Any]]) -> dict[str, Any]:
    for name, lines in rows.items():
        texts = [line if isinstance(line, dict) else {"text": line} for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return {
        "merge_method": method,
        "models": [{"model": str(path)} for path in made.experts[:2]],
        "dtype": "float32",
        "calibration": {
            "per_expert": {name: str(folder / f"{name}.jsonl") for name in rows},
            "batch_size": 1,
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "at", "whole"),
    [("regmean", [2, 2], 1), ("fisher", "writing", 1), ("regmean_plus", [1, 2], None)],
)
def test_killed_while_gathering(
    method: str, at: Any, whole: int | None, family: Callable[..., Any], tmp_path: Path
) -> None:
    made = family("llama", dtype="float32")
    written = recipe(made, method, tmp_path, TEXTS)
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-P", "-c", DYING, json.dumps(written), str(out), json.dumps(at)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    kept = [path for path in cache_folder(out).iterdir() if path.suffix != ".partial"]
    assert kept
    stamps = {path: path.stat().st_ino for path in kept}
    if whole is not None:
        assert len(kept) == whole
    told: list[str] = []

    def again(expert: str, done: int, total: int) -> None:
        told.append(expert)
        if whole is not None:
            assert all(path.stat().st_ino == stamp for path, stamp in stamps.items())

    merge(written, out, gathering=again)
    if whole is not None:  # the expert that was whole is told of once: all its rows are done
        assert told.count(str(made.experts[0])) == 1
        assert told.count(str(made.experts[1])) > 1
    assert not cache_folder(out).exists()
    merge(written, tmp_path / "whole")
    one, other = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        for folder in (out, tmp_path / "whole")
    )
    assert one == other


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_other_answers_are_other_rows(
    method: str, family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model was shown the answers too: statistics of a killed merge with others are not taken."""
    made = family("llama", dtype="float32")

    def asked(answer: str) -> dict[str, list[Any]]:
        return {name: [{"prompt": line, "answer": answer} for line in TEXTS[name]] for name in TEXTS}

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_tensors", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe(made, method, tmp_path, asked(" one")), tmp_path / "out")
    written = recipe(made, method, tmp_path, asked(" something else"))
    for name in ("out", "fresh"):
        merge(written, tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert one == other
