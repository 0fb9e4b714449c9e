"""``examples/bench_merge.py`` on tiny checkpoints: it runs, and its figures and verdicts are what they say.

Nothing here depends on how long anything took.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--parameters", "300K", "--experts", "2", "--dtype", "float32", "--rounds", "1", "--tensors", "90")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``part(name)``: a module of ``examples/bench_support``."""
    monkeypatch.syspath_prepend(ROOT / "examples")

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"bench_support.{name}")

    return load


def bench(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "bench_merge.py"), "--work", str(work), *arguments],
        cwd=work,
        env=os.environ | {"COLUMNS": "240"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_two_methods_are_measured(tmp_path: Path) -> None:
    done = bench(tmp_path, *SMALL, "--methods", "linear,dare_ties", "--no-mergekit")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_merge.json").read_text())
    assert [row["method"] for row in report["results"]] == ["linear", "dare_ties"]
    for row in report["results"]:
        assert all(len(row[name]["seconds"]) == 1 for name in ("copy", "engine", "process"))
        assert all(row[name]["median"] > 0 for name in ("copy", "engine", "process"))
        assert all(row[name]["cpu"][0] > 0 for name in ("engine", "process"))
        assert row["engine_of_copy"] > 0
        assert min(row["process"]["peak"], row["half_peak"], row["memory_bar"]) > 10_000_000
        assert "llvmlite" in row["imported"], "the trace of imports was not read"
        assert "numba" not in row["imported"]
        assert row["mergekit"]["seconds"] == []
    linear, dare = report["results"]
    assert dare["input_bytes"] == pytest.approx(1.5 * linear["input_bytes"], rel=0.01)
    assert report["many"]["tensors"] == 93
    assert report["many"]["process"]["median"] > 0
    assert all(seconds > 0 for seconds in report["startup"].values())
    assert all(rate > 0 for rates in report["reading"].values() for rate in rates.values())
    # engine, peak memory and flatness of two methods; start-up; two of the many-tensor case
    assert len(report["bars"]) == 9
    assert next(bar for bar in report["bars"] if bar["what"] == "start-up")["met"]
    text = (tmp_path / "bench_merge.md").read_text()
    assert "| dare_ties |" in text
    assert "processor" in text
    assert "dare_ties" in done.stdout
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "bench_merge.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_mergekit_takes_the_same_recipes(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    done = bench(tmp_path, *SMALL, "--methods", "slerp,della", "--tensors", "0")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_merge.json").read_text())
    for row in report["results"]:
        assert row["mergekit_fault"] == ""
        assert row["times_faster_than_mergekit"] > 0
        assert row["mergekit"]["peak"] > 0
    assert report["many"] is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--methods", "linear,lineer"), "lineer"),
        (("--parameters", "big"), "350M"),
        (("--parameters", "1K"), "too few"),
        (("--dtype", "int4"), "bfloat16"),
        (("--json", "nowhere/figures.json"), "no folder"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: tuple[str, str], word: str) -> None:
    done = bench(tmp_path, *arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_sizes(part: Any) -> None:
    checkpoints = part("checkpoints")
    for text in ("300K", "20M", "350M", "1.5B"):
        wanted = checkpoints.parse_count(text)
        size = checkpoints.of_parameters(wanted)
        assert size.parameters == pytest.approx(wanted, rel=0.15)
        half = size.halved()
        assert half.parameters == pytest.approx(wanted / 2, rel=0.3)
        assert half.largest == size.largest
    assert len(checkpoints.of_tensors(20_000).tensors) == 20_001


def test_experts_are_near_the_base_and_made_once(part: Any, tmp_path: Path) -> None:
    checkpoints, notes = part("checkpoints"), []
    size = checkpoints.of_tensors(21)
    models = checkpoints.build(tmp_path, size, dtype="float32", experts=2, note=notes.append)
    base, *experts = (load_file(checkpoints.weights(path)) for path in (models.base, *models.experts))
    assert {name: tensor.shape for name, tensor in base.items()} == size.tensors
    deltas = [np.concatenate([(one[name] - base[name]).ravel() for name in base]) for one in experts]
    assert all(0.0002 < delta.std() < 0.001 for delta in deltas)
    assert abs(np.corrcoef(*deltas)[0, 1]) < 0.1
    before = models.base.stat().st_mtime_ns
    checkpoints.build(tmp_path, size, dtype="float32", experts=2, note=notes.append)
    assert len(notes) == 1
    assert models.base.stat().st_mtime_ns == before


def test_bfloat16_is_rounded_to_nearest_even(part: Any) -> None:
    checkpoints = part("checkpoints")
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.02], np.float32)
    stored = checkpoints._encoded(values, "bfloat16")
    assert checkpoints._decoded(stored).tolist()[:4] == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7]
    assert math.isclose(checkpoints._decoded(stored)[4], -0.02, rel_tol=2**-8)


def test_a_bar_is_met_or_missed(part: Any) -> None:
    results, ran = part("results"), part("measure").Ran
    result = results.Result("ties", input_bytes=5, output_bytes=1, memory_bar=1000)
    for seconds in (1.0, 9.0, 2.0):
        result.copy.add(ran(seconds, 0.0, 0))
        result.engine.add(ran(4 * seconds, 0.0, 700))
    result.process.add(ran(5.0, 0.0, 800))
    result.mergekit.add(ran(95.0, 0.0, 3000))
    result.half_peak = 600
    result.imported = ["numpy", "torch"]
    many = results.Many(tensors=20_001, memory_bar=1000)
    many.process.add(ran(12.0, 0.0, 900))
    many.copy.add(ran(2.5, 0.0, 0))
    report = results.Report({}, {}, [result], many)
    assert [(bar.what.partition(": ")[2] or bar.what, bar.met) for bar in results.verdicts(report)] == [
        ("engine", True),  # 4.0 x, at most 4
        ("whole process", False),  # 19 x, at least 20
        ("peak memory", True),
        ("flat memory", False),  # 800 over 600
        ("start-up", False),
        ("bookkeeping", True),  # 9.5 s
        ("peak memory", True),
    ]
    assert results.as_json(report)["results"][0]["copy"]["median"] == 2.0


def test_no_figure_no_verdict(part: Any) -> None:
    results = part("results")
    result = results.Result("ties", input_bytes=5, output_bytes=1, memory_bar=1000)
    assert results.verdicts(results.Report({}, {}, [result])) == []


def test_peak_memory_of_a_process(part: Any, tmp_path: Path) -> None:
    """100 MB that were touched count; 100 MB of a mapped file do not."""
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    code = (
        "import mmap, time\n"
        "held = b'1' * 100_000_000\n"
        "file = open('file', 'rb')\n"
        "view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "view.find(b'x')\n"
        "time.sleep(0.3)\n"
    )
    ran = part("measure").run_process([sys.executable, "-c", code], cwd=tmp_path)
    assert 100_000_000 < ran.peak < 150_000_000
    assert 0 < ran.cpu < ran.seconds * 1.5
    with pytest.raises(part("measure").Failed, match="exit code 3"):
        part("measure").run_process([sys.executable, "-c", "raise SystemExit(3)"], cwd=tmp_path)


def test_a_copy_reads_everything_and_writes_one(part: Any, tmp_path: Path) -> None:
    inputs = [tmp_path / "a", tmp_path / "b"]
    inputs[0].write_bytes(bytes(3_000_001))
    inputs[1].write_bytes(os.urandom(3_000_001))
    assert part("measure").copy_bytes(inputs, tmp_path / "out", 3_000_000).seconds > 0
    assert (tmp_path / "out").read_bytes() == inputs[1].read_bytes()[:3_000_000]
