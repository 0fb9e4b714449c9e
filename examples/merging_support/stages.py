"""Stages that are kept: each is built once, and again only when what it is made from has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def stage(work: Path, name: str, made_from: dict[str, Any], build: Callable[[Path], object]) -> str:
    """Build ``work/name`` unless it is there, made from the same. Returns its identity for later stages."""
    text = json.dumps(made_from, indent=1, sort_keys=True, default=str)
    stamp, out = work / "stages" / f"{name.replace('/', '-')}.json", work / name
    if out.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        say(f"{name}: already there")
    else:
        wall, cpu = time.perf_counter(), time.process_time()
        stamp.unlink(missing_ok=True)  # it comes back when the result is whole
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        for folder in (stamp.parent, out.parent):
            folder.mkdir(parents=True, exist_ok=True)
        build(out)
        stamp.write_text(text, encoding="utf-8")
        say(f"{name}: {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write as a whole or not at all: a reader that comes half-way finds the old file."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
