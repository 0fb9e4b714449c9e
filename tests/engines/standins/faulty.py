"""An engine that does what a prompt says, for tests of processes: most of it is what no engine should do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.records import Chunk, Request
from mixmerge.errors import CheckpointError, Fault


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


class Faulty(EchoEngine):
    def __init__(self, name: str = "faulty", *, broken: str = "") -> None:
        super().__init__(name, reply=_act)
        self.broken = broken

    def load(self) -> None:
        if self.broken:
            raise CheckpointError([Fault("a", self.broken, "fine ones", "mend it"), Fault("b", self.broken)])
        super().load()

    def stream(self, request: Request) -> Iterator[Chunk]:
        for number in range(10**9):
            yield Chunk(f"{number} ")


class Refusing(EchoEngine):
    def __init__(self, name: str = "refusing") -> None:
        super().__init__(name)
        if "REFUSE" in os.environ:
            raise CheckpointError(Fault("here", "only in the process"))


def _act(request: Request) -> str:
    what, _, rest = str(request.prompt).partition(" ")
    if what == "print":
        sys.stdout.write("to standard output\n")
        sys.stdout.flush()
        os.write(1, b'{"id": 1, "gives": "nonsense"}\n')
        subprocess.run(["echo", "from a child"], check=True)
        return repr(sys.stdin.read())
    if what == "say":
        sys.stderr.write(
            "\n".join(f"line {at} of {'much ' * 100}" for at in range(int(rest))) + "\nthe last\n"
        )
    elif what == "exit":
        sys.stderr.write("progress 10%\rprogress 20%\nsomething broke\n")
        sys.stderr.flush()
        os._exit(int(rest))
    elif what == "crash":
        os.abort()
    elif what == "sleep":
        time.sleep(float(rest))
    elif what == "bug":
        raise ZeroDivisionError("a bug")
    elif what == "memory":
        raise MemoryError
    elif what == "device":
        raise OutOfMemoryError("CUDA out of memory")
    elif what == "spawn":
        return str(subprocess.Popen(["sleep", "600"]).pid)
    elif what == "environment":
        return os.environ.get(rest, "not set")
    elif what == "pid":
        return str(os.getpid())
    return str(request.prompt)
