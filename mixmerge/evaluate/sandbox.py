"""Programs that a model wrote, run where they can do no harm: for ``pass@1``.

On Linux a program gets a network, processes and mounts of its own (namespaces): no address answers, no process
outlives it, and all files but an empty folder in memory are read-only. Time, memory of a process, sizes of files and
the number of processes are limited by the kernel. Where namespaces are not to be had, the program's interpreter
refuses sockets, new processes and files outside its folder; that stops accidents and simple malice, not a program
that breaks out of Python. What of both it was is in the result, and a report says so.

It is no jail against an attacker of the kernel: programs of people you do not trust belong into a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import Fault, MixmergeError

NOT_STARTED = "could not be started"
_STARTS = 20.0  # seconds that an interpreter may take to start on a busy machine
_MOST = 65_536  # bytes of a report that are read
_SIGNALS = {signal.SIGKILL: "memory or time", signal.SIGXCPU: "time", signal.SIGSEGV: "crash"}


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Args:
        seconds: from its start to its end; above 0.
        memory: bytes of address space of each of its processes; 64 MiB or more: Python takes some of it.
        file_bytes: of each file it writes; of all of them four times as much, where namespaces are to be had.
        processes: and threads, at a time; 1 or more. Python starts as the first.

    Raises:
        MixmergeError: everything above that does not hold.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 16

    def __post_init__(self) -> None:
        wrong = [
            (not 0 < self.seconds <= 86_400, "seconds", self.seconds, "Above 0, at most 86,400"),
            (self.memory < 64 << 20, "memory", self.memory, f"{64 << 20:,} or more"),
            (self.file_bytes < 4096, "file_bytes", self.file_bytes, "4,096 or more"),
            (self.processes < 1, "processes", self.processes, "1 or more"),
        ]
        faults = [
            Fault(f"limits: {name}", f"is {value!r}", allowed) for bad, name, value, allowed in wrong if bad
        ]
        if faults:
            raise MixmergeError(faults)


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Args:
        passed: it ran to its end: no exception, no ``exit``, no limit. A program in the same interpreter that looks
            for it can fake this.
        why: what ended it before, in words; "" if nothing did.
        seconds: of all of it, the interpreter's start included.
        weaker: of ``network``, ``processes`` and ``files`` those that only the interpreter guarded, not the kernel.
    """

    passed: bool
    why: str
    seconds: float
    weaker: tuple[str, ...]


def run_program(program: str, *, limits: Limits | None = None, namespaces: bool = True) -> Ran:
    """Run a program of Python until it ends or a limit ends it. Nothing that it started lives on.

    Args:
        program: its source.
        limits: of time, memory, files and processes.
        namespaces: use them where the system has them.

    Raises:
        MixmergeError: the interpreter cannot be started here.
    """
    limits = limits or Limits()
    word, began = secrets.token_hex(16), time.perf_counter()
    job = {
        "program": program,
        "packages": sysconfig.get_paths()["purelib"],
        "word": word,
        "namespaces": namespaces,
        "seconds": limits.seconds,
        "memory": limits.memory,
        "file_bytes": limits.file_bytes,
        "room": 4 * limits.file_bytes,
        "processes": limits.processes,
    }
    with (
        tempfile.TemporaryDirectory(prefix="mixmerge-program-") as folder,
        tempfile.TemporaryFile() as report,
    ):
        # World-readable: the program may run as a user of its own.
        Path(folder).chmod(0o755)
        _start(job, folder, report.fileno(), limits)
        report.seek(0)
        lines = report.read(_MOST).splitlines()
    return _result(lines, word, time.perf_counter() - began, limits)


def run_programs(
    programs: Sequence[str], *, limits: Limits | None = None, workers: int = 1, namespaces: bool = True
) -> list[Ran]:
    """``run_program`` of each, in their order, so many side by side."""
    with ThreadPoolExecutor(max(1, workers)) as threads:
        return list(threads.map(lambda one: run_program(one, limits=limits, namespaces=namespaces), programs))


def _start(job: dict[str, Any], folder: str, report: int, limits: Limits) -> None:
    child = Path(__file__).with_name("sandbox_child.py")
    user = 1_000_000_000 + secrets.randbelow(900_000_000)  # so that no other program's processes count
    command = [sys.executable, "-I", "-S", "-B", str(child), str(report), folder, str(user)]
    # What the environment holds is the user's, keys among it. One thread each: they count as processes.
    environment = {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(report,),
            start_new_session=True,
            cwd=folder,
            env=environment,
        )
    except OSError as error:
        raise MixmergeError(Fault("sandbox", f"cannot start {sys.executable}: {error.strerror}")) from error
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(json.dumps(job).encode(), timeout=limits.seconds + _STARTS)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _result(lines: Sequence[bytes], word: str, seconds: float, limits: Limits) -> Ran:
    """What the report says; a program can write into it too, so that only the word counts."""
    said: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                said = {**message, **said}
    weaker = tuple(name for name in ("network", "processes", "files") if said.get(name) is not True)
    if said.get("word") == word and "timeout" not in said:
        return Ran(True, "", seconds, weaker)
    if "timeout" in said:
        why = f"took more than {limits.seconds:g} s"
    elif "signal" in said:
        ended = said["signal"]
        why = f"was ended by signal {ended} ({_SIGNALS.get(ended, 'its own')})"
    elif "error" in said:
        why = str(said.get("why", ""))
    elif "network" in said:
        why = "left before its end"
    else:
        why = NOT_STARTED
    return Ran(False, why, seconds, weaker)
