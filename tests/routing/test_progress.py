"""Progress of routing: bars on a terminal, nothing elsewhere, and the same results either way."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixmerge.evaluate.routing import evaluate_routers
from mixmerge.routers.base import Router
from mixmerge.routers.contract import sample
from mixmerge.routers.nearest import NearestRouter

Told = list[tuple[str, int, int]]


def test_what_is_told() -> None:
    told: Told = []
    router = NearestRouter().fit(sample(60), progress=lambda *step: told.append(step))
    assert told == [("fitting", done, 3) for done in range(4)]
    told.clear()
    reworded = {"shout": str.upper, "none": str}
    evaluate_routers(
        {"a": router, "b": router},
        sample(30, seed=1),
        perturbations=reworded,
        progress=lambda *step: told.append(step),
    )
    assert told == [("scoring", done, 6) for done in range(7)] + [("measuring", 0, 1), ("measuring", 1, 1)]


@pytest.mark.slow
def test_bars_are_on_the_terminal_alone(programs: Any, tmp_path: Path, on_a_terminal: Any) -> None:
    sample(60).write(tmp_path / "a.jsonl")
    sample(30, seed=1).write(tmp_path / "b.jsonl")
    (tmp_path / "q.txt").write_text("add the number\nrhyme the song\n")
    commands = {
        "fitting": ("fit", "a.jsonl", "--out", "router", "--overwrite", "--holdout", 0.3),
        "measuring": ("eval", "router", "--data", "b.jsonl"),
        "deciding": ("ask", "router", "-i", "q.txt"),
    }
    for part, command in commands.items():
        plain = [programs.python, "-P", "-m", "mixmerge", "route", *map(str, command)]
        stdout, seen = on_a_terminal(tmp_path, plain)
        assert part in seen
        assert part not in stdout
        assert part not in on_a_terminal(tmp_path, [*plain, "--quiet"])[1]
        piped = subprocess.run(plain, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert part not in piped.stderr
        assert piped.stdout == stdout
    assert Router.load(tmp_path / "router").experts == ("sums", "code", "verse", "plain")
