"""Running a stage: each device works through its groups, the next one is loaded while one generates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from mixmerge.batch.journal import Journal
from mixmerge.batch.placing import REMOTE, Placement
from mixmerge.batch.plan import Batch, Group, Stage
from mixmerge.batch.residence import Residence
from mixmerge.engines.base import Engine
from mixmerge.engines.records import Generation, Request
from mixmerge.errors import (
    EngineDiedError,
    Fault,
    MixmergeError,
    OutOfMemoryError,
    OutputError,
    StoppedError,
)

RETRIES = 2  # of a batch whose engine died, before it is divided
CONCURRENT = 8  # requests at one endpoint
_GLANCE = 0.5  # seconds between looks at whether a run that waits is to stop


@dataclass(frozen=True, eq=False)
class Hooks:
    """What a run tells.

    Args:
        done: after every batch, with the calls that are done now.
        stop: set to end the run after the batches that are at work.
        deadline: on the clock of ``time.monotonic``; None without one.
    """

    done: Callable[[Sequence[int]], None]
    stop: threading.Event
    deadline: float | None = None

    def check(self) -> None:
        if self.stop.is_set() or (self.deadline is not None and time.monotonic() > self.deadline):
            raise StoppedError(
                Fault("job", "was stopped before all was answered", run="Run the same command: it goes on")
            )


@dataclass(frozen=True, eq=False)
class StageRun:
    """One stage at work.

    Args:
        stage: what is asked; its offsets and faults are filled in.
        requests: those of some calls, with the adapters they need.
        journal: takes every answer.
        residences: device -> what is loaded there; with ``REMOTE``.
        experts: names, by a stage's numbers.
        hooks: what is told.
    """

    stage: Stage
    requests: Callable[[Sequence[int]], list[Request]]
    journal: Journal
    residences: Mapping[str, Residence]
    experts: Sequence[str]
    hooks: Hooks
    _news: threading.Condition = field(default_factory=threading.Condition)

    def run(self, placements: Sequence[Placement]) -> None:
        """Everything that is not answered yet.

        Raises:
            StoppedError: it was told to stop.
            MixmergeError: the journal cannot be written.
        """
        jobs: list[Callable[[], None]] = []
        for placement in placements:
            if placement.device == REMOTE:
                jobs += [lambda group=group: self._endpoint(group) for group in placement.groups]  # type: ignore[misc]
            else:
                jobs.append(lambda placement=placement: self._device(placement))  # type: ignore[misc]
        with ThreadPoolExecutor(max(1, len(jobs)), "device") as pool:
            try:
                _all_done([pool.submit(job) for job in jobs], self.hooks.stop)
            except BaseException:  # Ctrl-C too: the pool waits for the batches at work, and for no more
                self.hooks.stop.set()
                raise

    def _device(self, placement: Placement) -> None:
        residence = self.residences[placement.device]
        queue = [group for group in placement.groups if any(self._left(one) for one in group.batches)]
        with ThreadPoolExecutor(1, "prefetch") as ahead:
            for at, group in enumerate(queue):
                self.hooks.check()
                try:
                    with residence.use(group.unit) as engine:
                        following = queue[at + 1].unit if at + 1 < len(queue) else None
                        future = ahead.submit(residence.prepare, following) if following else None
                        self._group(group, engine)
                        if future is not None:
                            future.result()
                except (OutputError, StoppedError):
                    raise
                except (
                    MixmergeError
                ) as error:  # it cannot be loaded: its calls have no answer, the rest goes on
                    self._fail(self._open_calls(group), error)

    def _endpoint(self, group: Group) -> None:
        with self.residences[REMOTE].use(group.unit) as engine:
            at_once = int(getattr(engine, "concurrency", CONCURRENT))
            with ThreadPoolExecutor(at_once, "endpoint") as pool:
                _all_done([pool.submit(self._batch, one, engine) for one in group.batches], self.hooks.stop)

    def _group(self, group: Group, engine: Engine) -> None:
        for batch in group.batches:
            self._batch(batch, engine)

    def _batch(self, batch: Batch, engine: Engine) -> None:
        """Run a batch whole, unless it is done; in halves if it is too much for the engine."""
        calls = self._left(batch)
        if not calls:
            return
        self.hooks.check()
        self._wait(calls)
        for _ in range(RETRIES + 1):
            try:
                self._generate(batch, engine)
                return
            except OutOfMemoryError as error:
                reason: MixmergeError = error
                break
            except EngineDiedError as error:
                reason = error
            except (OutputError, StoppedError):
                raise
            except MixmergeError as error:
                self._fail(calls, error)
                return
        if len(batch.calls) == 1:
            self._fail(calls, reason)
            return
        self.journal.note({"split": batch.id, "why": type(reason).__name__})
        for half in batch.halves(self.stage.keys):
            self._batch(half, engine)

    def _generate(self, batch: Batch, engine: Engine) -> None:
        """Ask, and write what comes."""
        calls = [int(call) for call in batch.calls]
        without = {call: fault for call in calls if (fault := self._without(call)) is not None}
        able = [call for call in calls if call not in without]
        requests = self.requests(able)
        start = time.perf_counter()
        given = iter(engine.generate_each(requests) if able else ())
        seconds = time.perf_counter() - start
        found = [without[call] if call in without else next(given) for call in calls]
        names = [self.experts[int(self.stage.experts[call])] for call in calls]
        record(self.journal, self.stage, batch.unit, calls, found, seconds, names)
        self._tell(calls)

    def _wait(self, calls: Sequence[int]) -> None:
        """Until all that they read is offered, or will not be."""
        before = [one for call in calls for one in self.stage.before(call)]
        with self._news:
            while any(self.stage.open(one) for one in before):
                self.hooks.check()
                self._news.wait(_GLANCE)

    def _without(self, call: int) -> Fault | None:
        """Why a call cannot be asked: a peer that it would read has nothing to offer."""
        for one in self.stage.before(call):
            if one in self.stage.faults:
                peer = self.experts[int(self.stage.experts[one])]
                return Fault(f"peer {peer}", "offers nothing to read")
        return None

    def _tell(self, calls: Sequence[int]) -> None:
        with self._news:
            self._news.notify_all()
        self.hooks.done(calls)

    def _left(self, batch: Batch) -> list[int]:
        """Calls of a batch, if any of them has no answer: then all of it runs."""
        calls = [int(call) for call in batch.calls]
        return calls if any(self.stage.open(call) for call in calls) else []

    def _open_calls(self, group: Group) -> list[int]:
        return [int(call) for batch in group.batches for call in batch.calls if self.stage.open(int(call))]

    def _fail(self, calls: Sequence[int], error: MixmergeError) -> None:
        for call in calls:
            self.stage.faults[call] = str(error.faults[0])
        self._tell(calls)


def record(
    journal: Journal,
    stage: Stage,
    unit: str,
    calls: Sequence[int],
    found: Sequence[Generation | Fault],
    seconds: float,
    names: Sequence[str],
) -> None:
    """Write what came of the calls of a batch, and note where in their stage."""
    batch = Batch.of(unit, np.array(calls, np.int64), stage.keys)
    answers, answered = [], []
    per_expert: dict[str, list[int]] = {}
    for call, one, name in zip(calls, found, names, strict=True):
        if isinstance(one, Fault):
            stage.faults[call] = str(one)
            continue
        answered.append(call)
        answers.append((int(stage.keys[call]), {"expert": name, "stage": stage.number, **_said(one)}))
        counts = per_expert.setdefault(name, [0, 0, 0])
        for place, more in enumerate((1, one.tokens_in, one.tokens_out)):
            counts[place] += more
    done = {"stage": stage.number, "unit": unit, "seconds": seconds, "experts": per_expert}
    stage.offsets[answered] = journal.end(batch.id, answers, done)


def _said(one: Generation) -> dict[str, object]:
    said: dict[str, object] = {
        "text": one.text,
        "tokens_in": one.tokens_in,
        "tokens_out": one.tokens_out,
        "finish": one.finish,
    }
    if one.logprobs is not None:
        said["logprobs"] = list(one.logprobs)
    return said if one.weights is None else {**said, "weights": dict(one.weights)}


def _all_done(futures: Sequence[Future[None]], stop: threading.Event) -> None:
    """Wait for all; the first error stops the others after what they are at, and is raised."""
    _, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    if waiting:
        stop.set()
        for one in waiting:
            one.cancel()
    errors = [error for one in wait(futures).done if not one.cancelled() and (error := one.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
        raise error
