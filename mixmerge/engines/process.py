"""Any engine in a process of its own: its memory really is given back, and its crash is not ours."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from mixmerge.engines.apart import ApartEngine
from mixmerge.engines.process_child import Child


class ProcessEngine(ApartEngine):
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
        super().__init__(
            kind, arguments, name=name, start_timeout=start_timeout, timeout=timeout, grace=grace
        )
        self.python = python or sys.executable
        self.environment = {**(environment or {})}
        if visible_devices is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = visible_devices
        self.load_seconds = 0.0
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

    def _ask(self, what: str, given: Any = None) -> Any:
        return self._started().call(what, given, self.timeout)

    def _pieces(self, what: str, given: Any) -> Iterator[Any]:
        yield from self._started().pieces(what, given, self.timeout)

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
