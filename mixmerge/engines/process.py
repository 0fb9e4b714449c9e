"""Any engine in a process of its own: its memory really is given back, and its crash is not ours."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mixmerge.engines.base import Engine
from mixmerge.engines.process_child import Child
from mixmerge.engines.process_wire import chunk_of, fault_of, generation_of, likelihood_of, make_engine
from mixmerge.engines.records import Chunk, Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError


class ProcessEngine(Engine):
    """An engine that answers in a process of its own, started when it is needed and ended by ``unload``.

    What the engine raises is raised here: a MixmergeError with the same faults, OutOfMemoryError where memory ran out
    (of the device too), a WorkerError with its traceback for a bug. If the process ends or hangs, calls in flight
    raise EngineDiedError, which says how it ended and quotes the last lines it wrote; the next call starts a new one.
    The process and all it started end with this one, however it ends. Calls from many threads are answered one
    after another. Linux and macOS.

    Args:
        kind: a name in the table of engines, or ``module:Class``; it must be importable here too.
        arguments: of that engine, by name; JSON values.
        name: what errors call it; the engine inside gets it as well.
        python: the interpreter; by default this one. Another one needs this version of mixmerge.
        environment: variables that the process gets beside those of this one, or in their place.
        visible_devices: what ``CUDA_VISIBLE_DEVICES`` is in the process, such as ``0,1`` or an empty text.
        start_timeout: seconds until the process must have started; above 0. Loading the expert is not in it.
        timeout: seconds that it may be silent while it has something to do, above 0; then it counts as hung. None
            for any time. It says nothing while it loads, or generates a batch.
        grace: seconds that it has to end by itself when it is unloaded; 0 or more.

    Raises:
        MixmergeError: there is no such engine, or it refuses its arguments, or they are no JSON values.
    """

    def __init__(
        self,
        kind: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        name: str,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
        visible_devices: str | None = None,
        start_timeout: float = 120.0,
        timeout: float | None = None,
        grace: float = 10.0,
    ) -> None:
        super().__init__(name)
        _refuse_times(name, start_timeout=start_timeout, timeout=timeout, grace=grace)
        self.kind, self.arguments = kind, _as_json(arguments or {}, name)
        self.python = python or sys.executable
        self.environment = {**(environment or {})}
        if visible_devices is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = visible_devices
        self.start_timeout, self.timeout, self.grace = start_timeout, timeout, grace
        self.load_seconds = 0.0
        # Never loaded: it refuses wrong arguments at once, and says what it can without a process.
        self._twin = make_engine(kind, self.arguments, name)
        self.capabilities = self._twin.capabilities  # type: ignore[misc]  # each kind has its own
        self.batch_exact = self._twin.batch_exact  # type: ignore[misc]

        self._child: Child | None = None
        self._will: weakref.finalize[..., ProcessEngine] | None = None
        self._starting = threading.Lock()

    @property
    def loaded(self) -> bool:
        child = self._child
        return child is not None and child.alive and child.loaded

    @property
    def pid(self) -> int | None:
        """The process; None if there is none."""
        child = self._child
        return child.pid if child is not None and child.alive else None

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._twin.adapters

    def load(self) -> None:
        if not self.loaded:
            start = time.perf_counter()
            self._ask("load")
            self.load_seconds = time.perf_counter() - start

    def unload(self) -> None:
        """End the process."""
        with self._starting:
            child, self._child = self._child, None
        if child is not None:
            child.end(self.grace)

    def memory(self) -> int | None:
        found: int | None = self._ask("memory") if self.loaded else self._twin.memory()
        return found

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        return [fault_of(one) for one in self._ask("check", [asdict(request) for request in requests])]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return [
            generation_of(one) for one in self._ask("generate", [asdict(request) for request in requests])
        ]

    def generate_each(self, requests: Sequence[Request]) -> list[Generation | Fault]:
        given = self._ask("generate_each", [asdict(request) for request in requests])
        return [Fault(**one["fault"]) if "fault" in one else generation_of(one) for one in given]

    def stream(self, request: Request) -> Iterator[Chunk]:
        if "stream" not in self.capabilities:
            raise self._cannot("stream")
        return self._chunks(request)

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        return [likelihood_of(one) for one in self._ask("loglikelihood", [asdict(one) for one in scorings])]

    def _chunks(self, request: Request) -> Iterator[Chunk]:
        for one in self._started().pieces("stream", asdict(request), self.timeout):
            yield chunk_of(one)

    def _ask(self, what: str, given: Any = None) -> Any:
        return self._started().call(what, given, self.timeout)

    def _started(self) -> Child:
        with self._starting:
            if self._child is not None and self._child.alive:
                return self._child
            self._child = None
            child = Child(self.name, python=self.python, environment={**os.environ, **self.environment})
            # Who forgets to unload, or leaves by an error, must not leave it behind.
            if self._will is not None:
                self._will.detach()
            self._will = weakref.finalize(self, child.kill, "its engine is gone")
            try:
                child.greet(self.start_timeout)
                given = {"kind": self.kind, "arguments": self.arguments, "name": self.name}
                child.call("open", given, self.start_timeout)
            except BaseException:
                child.kill("it did not start")
                raise
            self._child = child
            return child


def _as_json(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    faults, found = [], {}
    for key, value in arguments.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            faults.append(
                Fault(f"engine {name}: {key}", f"cannot go to another process: {error}", "JSON values")
            )
    if faults:
        raise MixmergeError(faults)
    return found


def _refuse_times(name: str, *, start_timeout: float, timeout: float | None, grace: float) -> None:
    wrong = [
        (not start_timeout > 0, "start_timeout", start_timeout, "Seconds above 0"),
        (timeout is not None and not timeout > 0, "timeout", timeout, "Seconds above 0, or None"),
        (not grace >= 0, "grace", grace, "Seconds, 0 or more"),
    ]
    faults = [
        Fault(f"engine {name}: {key}", f"is {value!r}", allowed) for bad, key, value, allowed in wrong if bad
    ]
    if faults:
        raise MixmergeError(faults)
