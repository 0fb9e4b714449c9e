"""Real ``mixmerge`` processes that stop or die at a chosen step. Each is a fork, so it costs a tenth of a second.

A step is a call that changes the disk: making, opening for writing, cutting, writing, syncing, renaming,
removing. A process is sent the signal that was asked for before its step N, or before the N-th step after its first
step of a name; in a write, when half of the bytes are written.

Reads requests and writes answers, one JSON object a line each:
    {"arguments": [...], "folder": where stdout and stderr go, "at": N, [name, N] or null, "signal": ...}
        -> {"pid": ..., "stopped": true}, or {"pid": ..., "stopped": false, "code": ..., "out": ..., "err": ...}
    {"pid": ...}: goes on with a stopped process, and answers when it has ended.
    {"flush": ...}: how many bytes are written between two notes in the journal, from now on.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixmerge.cli import main
from mixmerge.engine import output

EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CALLS = ("pwrite", "write", "fdatasync", "fsync")


class Steps:
    """Counts steps of this process, writes their names to a file, and sends the signal."""

    def __init__(self, log: Path, at: int | list[Any] | None, number: int) -> None:
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.write, self.at, self.number = os.write, at, number
        self.count = 0
        self.lock = threading.Lock()

    def step(self, name: str) -> bool:
        """Whether this is the one."""
        with self.lock:
            self.count += 1
            self.write(self.log, f"{name}\n".encode())
            if isinstance(self.at, list) and name.startswith(self.at[0]):
                self.at = self.count + self.at[1]
            return self.count == self.at

    def fire(self) -> None:
        if self.number == signal.SIGSTOP:
            # Sent to the process, it may reach another thread, and this one writes on for a while.
            signal.pthread_kill(threading.get_ident(), self.number)
        else:
            os.kill(os.getpid(), self.number)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if not opened and event not in EVENTS:
            return
        # Compiled kernels and the like are kept elsewhere. What is removed by handle has a bare name.
        named = arguments[: 1 if opened else 2]
        paths = [Path(os.fsdecode(value)) for value in named if isinstance(value, str | bytes | Path)]
        ours = any(".mixmerge-" in str(path) or not path.is_absolute() for path in paths)
        if (ours or not paths) and self.step(f"{event} {' '.join(path.name for path in paths)}"):
            self.fire()

    def wrap(self, name: str) -> None:
        call: Callable[..., Any] = getattr(os, name)
        calls = itertools.count(1)

        def stepping(handle: int, *arguments: Any) -> Any:
            if not self.step(f"{name} {next(calls)}"):
                return call(handle, *arguments)
            if arguments:
                half = call(handle, arguments[0][: len(arguments[0]) // 2], *arguments[1:])
                self.fire()
                return half
            self.fire()
            return call(handle)

        setattr(os, name, stepping)


def child(request: dict[str, Any]) -> None:
    """Be the command; never returns."""
    code = 1
    try:
        folder = Path(request["folder"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for the life of the process
        # A test run started in the background inherits that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        steps = Steps(folder / "steps", request.get("at"), getattr(signal, request["signal"]))
        for name in CALLS:
            steps.wrap(name)
        sys.addaudithook(steps.audit)
        sys.argv = ["mixmerge", *request["arguments"]]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001  it is printed, as the interpreter would
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def answer(pid: int, folder: Path) -> dict[str, Any]:
    """Wait until a process stops or ends."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"pid": pid, "stopped": True}
    texts = {name: (folder / name).read_text() if (folder / name).exists() else "" for name in ("out", "err")}
    return {"pid": pid, "stopped": False, "code": os.waitstatus_to_exitcode(status), **texts}


def serve() -> None:
    folders: dict[int, Path] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "flush" in request:
            output.FLUSH_BYTES = request["flush"]
            reply: dict[str, Any] = {}
        elif "pid" in request:
            os.kill(request["pid"], signal.SIGCONT)
            reply = answer(request["pid"], folders[request["pid"]])
        elif request.get("here"):
            # Loads the kernels, so that no child has to.
            sys.argv = ["mixmerge", *request["arguments"]]
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
                main()
            reply = {}
        else:
            gc.freeze()  # what the collector touches would be copied
            pid = os.fork()
            if pid == 0:
                child(request)
            folders[pid] = Path(request["folder"])
            reply = answer(pid, folders[pid])
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
