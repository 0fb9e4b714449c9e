"""``examples/bench_learn.py`` on next to nothing: it runs, and its figures are what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "examples" / "bench_learn.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(BENCH), *options, "--repeats", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("density", ["1", "0.2"])
def test_a_step_beside_a_plain_pass(density: str) -> None:
    done = run("--layers", "1", "--experts", "1", "--tokens", "256", "--density", density)
    assert ("trimmed to 0.2 and sign-elected" in done.stdout) == (density == "0.2")
    seconds = {
        name: float(found) for name, found in re.findall(r"^  (.+?) +([\d.]+) s of", done.stdout, re.M)
    }
    assert seconds.keys() == {"plain", "learning", "pass and products", "rebuild"}, done.stderr
    ratio = float(re.findall(r"learning / plain +([\d.]+)", done.stdout)[0])
    assert ratio == pytest.approx(seconds["learning"] / seconds["plain"], abs=0.02)
    assert done.returncode == (0 if ratio <= 1.3 else 1) or abs(ratio - 1.3) < 0.01


def test_attention_of_both_forms() -> None:
    done = run("--attention", "--tokens", "64")
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"(float32|bfloat16) +(\d+) tokens a row: fused +([\d.]+), plain +([\d.]+)", done.stdout
    )
    assert [(precision, int(length)) for precision, length, *_ in rows] == [
        (precision, length) for precision in ("float32", "bfloat16") for length in (32, 64, 128, 256, 512)
    ]
