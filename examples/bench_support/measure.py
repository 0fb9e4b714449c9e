"""Seconds and peak memory of a process, of the engine in a process that lives on, and of plain copies."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_EVERY = 0.02
_BLOCK = 1 << 20  # stays in a core's cache, so that a copy waits for files only
_RESIDENT = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")
_IMPORTED = re.compile(r"^import time:\s*\d+ \|\s*\d+ \|\s*([\w.]+)$", re.MULTILINE)


class Failed(RuntimeError):  # noqa: N818  said to a person as it is
    """A process ended badly; the message is the end of what it said."""


@dataclass(frozen=True)
class Ran:
    """One run: its time, the time of all its threads, the most memory it held, and what it wrote to stderr.

    Threads that wait for a core on a busy machine stretch ``seconds``, not ``cpu``.
    """

    seconds: float
    cpu: float
    peak: int
    said: str = ""


class PeakMemory:
    """Watches a process while the block runs: anonymous and shared memory that is resident, in bytes.

    Pages of mapped files are left out on both sides: the kernel takes them back when it likes.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                found = _RESIDENT.findall(self._status.read_bytes())
            except OSError:  # it has ended
                return
            self.peak = max(self.peak, 1024 * sum(map(int, found)))
            self._stop.wait(_EVERY)


def run_process(command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """A whole process, from its start to its end.

    Args:
        env: environment variables, unless ours has them.

    Raises:
        Failed: it ended with another code than 0.
    """
    spent, began = _spent_by_children(), time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**(env or {}), **os.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with PeakMemory(process.pid) as memory:
        said, complained = process.communicate()
        seconds = time.perf_counter() - began
    if process.returncode:
        lines = (complained or said).strip().splitlines()
        raise Failed(f"exit code {process.returncode}: " + "\n".join(lines[-5:]))
    return Ran(seconds, _spent_by_children() - spent, memory.peak, complained)


def _spent_by_children() -> float:
    """CPU seconds of all children that have ended: one at a time does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def imported(said: str) -> set[str]:
    """Packages that ``python -X importtime`` reports."""
    return {name.split(".")[0] for name in _IMPORTED.findall(said)}


class Engine:
    """``mixmerge.engine.merge.run`` on one plan in a process that lives on, so that imports are paid."""

    def __init__(self, recipe: Path, *, threads: int | None, cwd: Path) -> None:
        child = Path(__file__).with_name("engine_child.py")
        command = [sys.executable, "-P", str(child), str(recipe), str(threads or 0)]
        self._process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.planning: float = self._answer()["seconds"]

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def merge(self, out: Path) -> Ran:
        """One merge; ``out`` must not exist.

        Raises:
            Failed: the child died.
        """
        if self._process.stdin is None:
            raise RuntimeError("the child was started without a pipe")
        with PeakMemory(self._process.pid) as memory:
            self._process.stdin.write(f"{out}\n")
            self._process.stdin.flush()
            answer = self._answer()
        return Ran(answer["seconds"], answer["cpu"], memory.peak)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            _, complained = self._process.communicate()
            raise Failed("the engine's process ended: " + "\n".join(complained.strip().splitlines()[-5:]))
        answer: dict[str, Any] = json.loads(line)
        return answer


def copy_bytes(inputs: Sequence[Path], output: Path, size: int) -> Ran:
    """Read all inputs in step and write ``size`` bytes to a new file, synced; one thread, one buffer."""
    buffer = memoryview(bytearray(_BLOCK))
    spent, began = time.process_time(), time.perf_counter()
    handles = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        at = written = 0
        while max(os.preadv(handle, [buffer], at) for handle in handles):
            written += os.write(target, buffer[: min(_BLOCK, size - written)])
            at += _BLOCK
        os.fsync(target)
    finally:
        for handle in (*handles, target):
            os.close(handle)
    return Ran(time.perf_counter() - began, time.process_time() - spent, len(buffer))


def warm(paths: Sequence[Path]) -> None:
    """Read files into the page cache."""
    buffer = memoryview(bytearray(_BLOCK))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
