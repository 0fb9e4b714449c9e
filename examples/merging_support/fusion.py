"""FusionBench beside us: its own virtual environment, and one job for each method that both have."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from bench_support.measure import Ran, run_process

from merging_support.encoders import write_trunk
from merging_support.entries import Entry
from merging_support.stages import write_json
from merging_support.texts import SOURCES

PACKAGES = ("torch==2.13.0", "fusion-bench==0.2.33")
RUNNER = Path(__file__).with_name("fusion_runner.py")
QUIET = {"GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


def make_environment(out: Path) -> None:
    """A virtual environment of its own: what FusionBench depends on stays away from ours."""
    if not (out / "bin" / "python").exists():
        venv.create(out, with_pip=True)
    subprocess.run([str(out / "bin" / "python"), "-m", "pip", "install", "-q", *PACKAGES], check=True)


def run_job(
    python: Path, entry: Entry, base: Path, experts: dict[str, Path], rows: dict[str, Path], out: Path
) -> Ran:
    """FusionBench's method of an entry on the same trunks: a folder with the merged trunk, and what it cost."""
    method, settings = entry.against or ("", {})
    job: dict[str, Any] = {
        "method": method,
        "settings": settings,
        "base": str(base),
        "experts": {task: str(folder / "trunk") for task, folder in experts.items()},
        "heads": {task: str(folder) for task, folder in experts.items()},
        "data": {task: str(file) for task, file in rows.items()},
        "tokens": {task: SOURCES[task].tokens for task in experts},
        "out": str(out),
    }
    told = out.with_name(f"{out.name}.job.json")
    write_json(told, job)
    ran = run_process([str(python), str(RUNNER), str(told)], cwd=out.parent, env=QUIET)
    from safetensors.torch import load_file

    write_trunk(base, load_file(out / "model.safetensors"), out)
    return ran


def run_ours(recipe: Path, out: Path) -> Ran:
    """``mixmerge merge`` as a process of its own, so that both sides pay for their start and imports."""
    command = [sys.executable, "-P", "-m", "mixmerge", "merge", str(recipe), str(out), "--overwrite"]
    return run_process(command, cwd=out.parent, env=QUIET)


def cost(ran: Ran) -> dict[str, float]:
    return {"seconds": ran.seconds, "cpu": ran.cpu, "peak": ran.peak}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
