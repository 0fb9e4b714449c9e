"""The other side of a ``ProcessEngine``: ``python -m mixmerge.engines.worker`` runs one engine for who started it.

It speaks ``process_wire`` over its standard input and output. What the engine and its libraries print goes to the
standard error. When the input ends, or the process that started it is gone, it ends at once, with all processes it
started: nobody waits for what it does.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, BinaryIO, Protocol, runtime_checkable

from mixmerge.engines.base import Engine
from mixmerge.engines.process_wire import (
    VERSION,
    line_of,
    make_engine,
    message_of,
    raised,
    request_of,
    scoring_of,
)
from mixmerge.errors import Fault, MixmergeError

_GLANCE = 1.0  # seconds between looks at who the parent is


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can free its device and keep its process."""

    def sleep(self, level: int) -> None: ...


def _generate(engine: Engine, given: Any) -> Any:
    return [asdict(one) for one in engine.generate([request_of(one) for one in given])]


def _generate_each(engine: Engine, given: Any) -> Any:
    found = engine.generate_each([request_of(one) for one in given])
    return [{"fault": asdict(one)} if isinstance(one, Fault) else asdict(one) for one in found]


def _check(engine: Engine, given: Any) -> Any:
    found = engine.check([request_of(one) for one in given])
    return [None if fault is None else asdict(fault) for fault in found]


def _prepare(engine: Engine, given: Any) -> Any:
    engine.prepare([request_of(one) for one in given])


def _loglikelihood(engine: Engine, given: Any) -> Any:
    return [asdict(one) for one in engine.loglikelihood([scoring_of(one) for one in given])]


def _sleep(engine: Engine, given: Any) -> Any:
    if not isinstance(engine, Sleeper):
        raise MixmergeError(Fault(f"engine {engine.name}", "cannot sleep"))
    engine.sleep(given)


def _stream(engine: Engine, given: Any) -> Iterator[Any]:
    return (asdict(chunk) for chunk in engine.stream(request_of(given)))


# What is asked -> how an engine answers it, in JSON values.
ANSWERS: Mapping[str, Callable[[Engine, Any], Any]] = {
    "load": lambda engine, _: engine.load(),
    "memory": lambda engine, _: engine.memory(),
    "prepare": _prepare,
    "generate": _generate,
    "generate_each": _generate_each,
    "check": _check,
    "loglikelihood": _loglikelihood,
    "sleep": _sleep,
}
PIECES: Mapping[str, Callable[[Engine, Any], Iterator[Any]]] = {"stream": _stream}


class Worker:
    """Answers calls until it is told to end.

    Args:
        calls: where they come from.
        answers: where their answers go.
    """

    def __init__(self, calls: int, answers: BinaryIO) -> None:
        self._fd, self._answers = calls, answers
        self._calls: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._unwanted: set[int] = set()
        self._engine: Engine | None = None

    def run(self) -> None:
        threading.Thread(target=self._hear, daemon=True).start()
        self._say({"id": 0, "protocol": VERSION})
        while (message := self._calls.get())["call"] != "end":
            self._answer(message)
        if self._engine is not None:
            self._engine.unload()

    def _hear(self) -> None:
        """Hears of cancellations while a call is being answered, and of the end of the one who calls.

        The kernel's own signal for a parent's death (PR_SET_PDEATHSIG) is for the thread that started the process:
        it would end the worker when that thread does.
        """
        parent, rest = os.getppid(), bytearray()
        while True:
            ready, _, _ = select.select([self._fd], [], [], _GLANCE)
            if os.getppid() != parent:  # a fork of the parent may still hold the pipe open
                _end_all()
            if not ready:
                continue
            data = os.read(self._fd, 1 << 20)
            if not data:
                _end_all()
            rest += data
            if b"\n" in data:
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    self._take(message_of(bytes(line) + b"\n"))

    def _take(self, message: dict[str, Any] | None) -> None:
        if message is None or "call" not in message:
            sys.stderr.write("the call is not of the protocol\n")
            _end_all()
        elif message["call"] == "cancel":
            self._unwanted.add(message["id"])
        else:
            self._calls.put(message)

    def _say(self, message: dict[str, Any]) -> None:
        loaded = self._engine is not None and self._engine.loaded
        self._answers.write(line_of({**message, "loaded": loaded}))
        self._answers.flush()

    def _answer(self, message: dict[str, Any]) -> None:
        number, call, given = message["id"], message["call"], message.get("given")
        try:
            self._say({"id": number, "gives": self._do(number, call, given)})
        except Exception as error:  # noqa: BLE001  the caller raises it on its side
            self._say({"id": number, "raises": raised(error)})

    def _do(self, number: int, call: str, given: Any) -> Any:
        if call == "open":
            self._engine = make_engine(given["kind"], given["arguments"], given["name"])
            return None
        if self._engine is None:
            raise MixmergeError(Fault("worker", f"{call} before open"))
        if call not in PIECES:
            return ANSWERS[call](self._engine, given)
        for piece in PIECES[call](self._engine, given):
            if number in self._unwanted:
                break
            self._say({"id": number, "piece": piece})
        return None


def _end_all() -> None:
    if os.getpgid(0) == os.getpid():  # the group is its own, with what the engine started
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Takes the standard streams for itself: a library that prints or reads cannot disturb the conversation."""
    faulthandler.enable()
    calls, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with os.fdopen(answers, "wb") as out:
        Worker(calls, out).run()


if __name__ == "__main__":
    main()
