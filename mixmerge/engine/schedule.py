"""Tasks as coroutines over chunks, run by a few threads. What a result is never depends on who computed what.

A job is a generator: it yields a ``Pass`` (a function to call on every chunk), is sent the results in the order
of the chunks, and goes on. While one job waits for its last chunks, idle threads start the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmerge.engine.worker import Worker

ChunkFunction = Callable[[Worker, int, int, int], Any]


@dataclass(frozen=True)
class Pass:
    """Call ``run(worker, number, start, stop)`` for every chunk."""

    run: ChunkFunction
    chunks: Sequence[tuple[int, int]]


Job = Generator[Pass, list[Any], None]


@dataclass
class _Active:
    job: Job
    done: Callable[[], None]
    results: list[Any] = field(default_factory=list)
    step: Pass | None = None
    waiting: int = 0


class Schedule:
    """Runs jobs on threads; the first exception stops everything and is raised in the caller."""

    def __init__(self, jobs: Iterator[tuple[Job, Callable[[], None]]], workers: Sequence[Worker]) -> None:
        self._jobs, self._workers = jobs, workers
        self._ready: deque[tuple[_Active, int]] = deque()
        self._active = 0
        self._exhausted = False
        self._error: BaseException | None = None
        self._change = threading.Condition()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._loop, args=(worker,), name=f"mixmerge-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            # Ctrl-C reaches only this thread: the others finish their chunk and stop.
            self._stop(KeyboardInterrupt())
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error

    def _stop(self, error: BaseException) -> None:
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def _loop(self, worker: Worker) -> None:
        try:
            while (work := self._take()) is not None:
                active, number = work
                self._run_one(worker, active, number)
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller's thread raises it
            self._stop(error)

    def _take(self) -> tuple[_Active, int] | None:
        """A chunk to run, or a new job (number -1), or None at the end."""
        with self._change:
            while True:
                if self._error is not None:
                    return None
                if self._ready:
                    return self._ready.popleft()
                if not self._exhausted and self._active <= len(self._workers):
                    following = next(self._jobs, None)
                    if following is not None:
                        self._active += 1
                        return _Active(*following), -1
                    self._exhausted = True
                if self._exhausted and self._active == 0:
                    return None
                self._change.wait()

    def _run_one(self, worker: Worker, active: _Active, number: int) -> None:
        if number >= 0:
            step = active.step
            if step is None:
                raise RuntimeError("a chunk of a finished pass")
            result = step.run(worker, number, *step.chunks[number])
            with self._change:
                active.results[number] = result
                active.waiting -= 1
                if active.waiting:
                    return
        self._advance(active, first=number < 0)

    def _advance(self, active: _Active, *, first: bool) -> None:
        while True:
            try:
                step = next(active.job) if first else active.job.send(active.results)
            except StopIteration:
                active.done()
                with self._change:
                    self._active -= 1
                    self._change.notify_all()
                return
            first = False
            active.step, active.results = step, [None] * len(step.chunks)
            active.waiting = len(step.chunks)
            if step.chunks:
                break
        with self._change:
            self._ready.extend((active, number) for number in range(len(step.chunks)))
            self._change.notify_all()
