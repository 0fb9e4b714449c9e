"""Python programs in processes of their own that need not load torch and transformers, which takes seconds.

``python programs.py SOCKET LIBRARIES`` loads what many programs load, nothing of mixmerge, and then forks for each
program that is asked for. The fork has the streams, the folder, the arguments and the environment of who asked, runs
the program as ``__main__`` and ends as a Python process ends. It ends when its asker does, and the server when its
standard input ends.

An asker sends the length of a JSON object, the object and its three streams, and reads an exit code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any

OWN_PATH = os.environ.get("PYTHONPATH", "")
# Asks for a program in place of running it. What it does not understand, it leaves to the real Python.
ASKER = """#!{python} -IS
import json, os, socket, sys
arguments = {before} + sys.argv[1:]
at = 1 if arguments[:1] == ["-P"] else 0
known = arguments[at:at + 1] and (arguments[at] in ("-m", "-c") or not arguments[at].startswith("-"))
inherited = json.loads({inherited!r})
if not known or any(os.environ.get(name) != value for name, value in inherited.items()):
    os.execv({python!r}, [{python!r}, *arguments])
text = json.dumps({{"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    socket.send_fds(server, [len(text).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(text)
    code = int(server.makefile().readline() or 1)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def _whole(asker: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = asker.recv(size - len(found))
        if not part:
            raise SystemExit("the asker has gone")
        found += part
    return found


def _end_with(asker: socket.socket, pid: int) -> None:
    """Nobody waits for a program whose asker was killed."""
    with contextlib.suppress(OSError):
        if not asker.recv(1):
            os.killpg(pid, signal.SIGKILL)


def _answer(asker: socket.socket) -> dict[str, Any] | None:
    """In the process that is to run a program: what was asked. In the one that waits for it: ``None``."""
    size, streams, _, _ = socket.recv_fds(asker, 8, 3)
    asked: dict[str, Any] = json.loads(_whole(asker, int.from_bytes(size, "little")))
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        for stream in streams:
            os.close(stream)
        threading.Thread(target=_end_with, args=(asker, pid), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            asker.sendall(f"{code}\n".encode())
        return None
    os.setpgid(0, 0)
    asker.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return asked


def served(path: str) -> dict[str, Any] | None:
    """Fork for each asker; returns in the forks alone, or when nobody asks any more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        waiting: list[int] = []
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return None
            asker, _ = listener.accept()
            waiting.append(os.fork())
            if waiting[-1] == 0:
                listener.close()
                return _answer(asker)
            asker.close()
            waiting = [pid for pid in waiting if os.waitpid(pid, os.WNOHANG) == (0, 0)]


def _look_in(path: str) -> None:
    """Put a PYTHONPATH in the place of this process's own."""
    own = {*filter(None, OWN_PATH.split(os.pathsep)), str(Path(__file__).resolve().parent)}
    sys.path[:] = [*filter(None, path.split(os.pathsep)), *(one for one in sys.path if one not in own)]


def run(asked: dict[str, Any]) -> None:
    """What ``python ARGUMENTS`` does, in this process."""
    arguments = asked["arguments"]
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    random.seed()
    _look_in(asked["environment"].get("PYTHONPATH", ""))
    safe = arguments[0] == "-P"
    first, *rest = arguments[safe:]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[:0] = [] if safe else [""]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec", dont_inherit=True), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        sys.path[:0] = [] if safe else [str(Path.cwd())]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[:0] = [] if safe else [str(Path(first).resolve().parent)]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for library in sys.argv[2].split(","):
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all these pages
    request = served(sys.argv[1])
    if request is not None:
        run(request)
