"""A job from end to end: read, decide, ask stage by stage, compose. What is in memory of a request are numbers."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice, tee
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mixmerge.batch.costs import Report, report
from mixmerge.batch.decided import Decided
from mixmerge.batch.journal import FILE, Journal, fault_of
from mixmerge.batch.latents import look_again, part_of
from mixmerge.batch.lines import Line
from mixmerge.batch.opening import open_engine, size_of, token_bytes
from mixmerge.batch.placing import REMOTE, Placement, place
from mixmerge.batch.plan import Stage, estimated, groups, loads_in_order
from mixmerge.batch.records import Answer, Item
from mixmerge.batch.replay import Replay, key
from mixmerge.batch.residence import Residence
from mixmerge.batch.running import Hooks, StageRun
from mixmerge.batch.setup import Conditions, Setup, Source
from mixmerge.engines.records import Request
from mixmerge.errors import Fault, MixmergeError

Progress = Callable[[str, int, int], None]  # (what, done, in all)
MOST_STAGES = 64
_READ = 1_024  # requests that are read at a time
MOST_TOKENS = 1 << 40
_CACHE_SHARE = 0.5  # of the memory beside the weights, for keys and values; activations take the rest


class Job:
    """A job in a folder of its own, from which it goes on after a kill.

    Args:
        source: the requests.
        setup: who answers, and how.
        work: folder of the journal; made if it is not there.
        conditions: where it runs.
        progress: told how far it is.
        stop: set to end the run after the batches that are at work.

    Raises:
        MixmergeError: the folder is of another job, or in use; there is no request.
    """

    def __init__(
        self,
        source: Source,
        setup: Setup,
        work: Path,
        conditions: Conditions | None = None,
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.source, self.setup, self.work = source, setup, work
        self.conditions = conditions or Conditions()
        self._tell: Progress = progress or (lambda what, done, total: None)
        self.stop = stop or threading.Event()
        self.stages: list[Stage] = []
        self.naive_loads = 0
        self.bad: dict[int, tuple[str, Fault]] = {}
        self._read()
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise fault_of(work, error) from error
        self.journal = Journal(work / FILE, job=self._about())
        self.decided = Decided(work / "decisions.jsonl", self._rows)

    @cached_property
    def created(self) -> int:
        """Seconds since 1970 when the job was first run."""
        return self._noted("created", int(time.time()))

    @property
    def latents(self) -> Path:
        """The folder where experts keep what others read."""
        return self.work / "latents"

    # --- the input

    def _read(self) -> None:
        """Look at every line once; a line that is no request is known by its fault."""
        self._rows = 0
        for line in self.source.scan():
            fault = line.fault or self._unfit(line)
            if fault is not None:
                self.bad[line.index] = (line.id, fault)
            self._rows += 1
        if not self._rows:
            raise MixmergeError(Fault("input", "has no request", "One on each line"))

    def _unfit(self, line: Line) -> Fault | None:
        """What keeps a request from being asked at all."""
        if line.item is None or line.item.expert is None or line.item.expert in self.setup.experts.names:
            return None
        known = ", ".join(self.setup.experts.names)
        what = f"no expert is called {line.item.expert!r}"
        return Fault(f"line {line.number}: model", what, f"Known: {known}")

    def _about(self) -> dict[str, Any]:
        return {
            "version": 1,
            "input": self.source.sha256,
            "mixture": self.setup.identity,
            "batch_tokens": self.conditions.batch_tokens,
        }

    def items(self, rows: Iterable[int]) -> Iterator[tuple[int, Item]]:
        """Requests by row; the input is opened once for many."""
        left = iter(rows)
        while chunk := list(islice(left, _READ)):
            for row, line in zip(chunk, self.source.read(chunk), strict=True):
                if line.item is None:
                    raise MixmergeError(line.fault or Fault(f"line {line.number}", "is no request"))
                yield row, line.item

    def __len__(self) -> int:
        return self._rows

    # --- decisions and stages

    def decide(self) -> None:
        """Decide who answers each request, unless a run before has."""
        good = [row for row in range(len(self)) if row not in self.bad]
        done = 0

        def more(count: int) -> None:
            nonlocal done
            done += count
            self._tell("deciding", done, len(good))

        self.decided.make(self.items(good), self.setup.route, whole=self.setup.whole, progress=more)

    def replays(self, rows: Iterable[int]) -> Iterator[Replay]:
        """Requests as far as they have come."""
        for row, item in self.items(rows):
            yield Replay(row, item, partial(self.decided.of, row), self.setup, self.stages, self.journal)

    def next_stage(self) -> Stage | None:
        """The next stage, with the answers that are in the journal; None if every request has settled."""
        number = len(self.stages)
        if number >= MOST_STAGES:
            raise MixmergeError(Fault("compose", f"asks for more than {MOST_STAGES} stages"))
        names = {name: at for at, name in enumerate(self.setup.experts.names)}
        columns: list[array[int]] = [array("q") for _ in range(6)]
        keys = array("Q")
        for view in self.replays(self._unsettled()):
            asks = view.outcome(number)
            for at, ask in enumerate(asks if isinstance(asks, tuple) else ()):
                request = view.request(ask)
                new = 0 if ask.offers else request.max_new_tokens
                numbers = (view.row, at, names[ask.expert], estimated(request.prompt), new, part_of(ask))
                for column, value in zip(columns, numbers, strict=True):
                    column.append(value)
                keys.append(key(request, number, ask))
        if not keys:
            return None
        names_of = np.array(keys, np.uint64)
        rows, places, experts, tokens, news, parts = (np.array(one, np.int64) for one in columns)
        found = self.journal.find(names_of)
        stage = Stage(number, rows, places, experts, tokens, news, names_of, found, parts=parts)
        self.stages.append(stage)
        self.naive_loads += loads_in_order(stage, self.setup.experts)
        return stage

    def _unsettled(self) -> Iterator[int]:
        """Rows that may ask more."""
        if self.stages:
            yield from map(int, np.unique(self.stages[-1].rows))
        else:
            yield from (row for row in range(len(self)) if row not in self.bad)

    # --- running

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Unit -> bytes."""
        return {unit: size_of(members) for unit, members in self.setup.experts.units().items()}

    @cached_property
    def budgets(self) -> dict[str, int]:
        """Unit -> tokens of a batch: what is asked for, or what keys and values have room for beside the weights.

        The memory that was there when the job was first run decides, so that a job that goes on has the same batches.
        """
        smallest = min(device.memory for device in self.conditions.devices)
        memory = self._noted("memory", smallest)
        found = {}
        for unit, members in self.setup.experts.units().items():
            each = token_bytes(members)
            room = int(_CACHE_SHARE * max(0, memory - self.sizes[unit])) // each if each else MOST_TOKENS
            found[unit] = max(1, min(self.conditions.batch_tokens, room))
        return found

    def _noted(self, name: str, value: int) -> int:
        """A number of the job's first run."""
        for event in self.journal.events:
            if name in event:
                return int(event[name])
        self.journal.note({name: value})
        return value

    def placements(self, stage: Stage, *, loaded: frozenset[str] = frozenset()) -> list[Placement]:
        """Which device runs what of a stage, in what order."""
        found = groups(
            stage, self.setup.experts, self.sizes, budgets=self.budgets, splits=self.journal.splits
        )
        return place(found, self.conditions.devices, loaded=loaded)

    def run(self, *, settled: Callable[[Answer], None] | None = None) -> Report:
        """Run what has not been run.

        Args:
            settled: told each answer as soon as it is there, those of a run before included, in any order.

        Raises:
            StoppedError: ``stop`` was set, or the deadline is over; the same job goes on later.
            MixmergeError: the disk refuses, or an expert fits into no device.
        """
        limit = self.conditions.deadline
        deadline = None if limit is None else time.monotonic() + limit
        self.decide()
        residences = self._residences()
        try:
            self._emit_unasked(settled)
            for begun in list(self.stages):
                self._run_stage(begun, residences, deadline, settled)
            while (stage := self.next_stage()) is not None:
                self._run_stage(stage, residences, deadline, settled)
        finally:
            for one in residences.values():
                one.close()
        return self.report()

    def _run_stage(
        self,
        stage: Stage,
        residences: dict[str, Residence],
        deadline: float | None,
        settled: Callable[[Answer], None] | None,
    ) -> None:
        lock, done = threading.Lock(), int((stage.offsets >= 0).sum())
        look_again(stage, self.journal, self.latents)
        waiting = [stage.open(call) for call in range(len(stage))]
        left = np.bincount(stage.rows, weights=waiting, minlength=len(self)).astype(np.int64)
        self._emit(settled, [int(row) for row in np.unique(stage.rows) if not left[row]], stage.number + 1)

        def finished(calls: Sequence[int]) -> None:
            nonlocal done
            with lock:
                done += len(calls)
                self._tell(f"stage {stage.number + 1}", min(done, len(stage)), len(stage))
                rows = {int(stage.rows[call]) for call in calls}
                ready = [row for row in rows if left[row] and not any(map(stage.open, stage.calls_of(row)))]
                left[ready] = 0
                self._emit(settled, ready, stage.number + 1)

        loaded = frozenset().union(*(one.units for one in residences.values()))
        run = StageRun(
            stage,
            partial(self._requests, stage),
            self.journal,
            residences,
            self.setup.experts.names,
            Hooks(finished, self.stop, deadline),
        )
        run.run(self.placements(stage, loaded=loaded))

    def _requests(self, stage: Stage, calls: Sequence[int]) -> list[Request]:
        """What engines are asked in some calls of a stage, in their order."""
        views = self.replays([int(stage.rows[call]) for call in calls])
        return [view.asked(stage, call) for call, view in zip(calls, views, strict=True)]

    def _residences(self) -> dict[str, Residence]:
        units = self.setup.experts.units()

        def of(device: str, memory: int) -> Residence:
            def loaded(unit: str, seconds: float) -> None:
                if not units[unit][0].remote:
                    self.journal.note({"load": unit, "device": device, "seconds": seconds})

            return Residence(
                memory,
                open_engine=lambda unit: open_engine(
                    units[unit],
                    device=device,
                    apart=self.conditions.apart,
                    cluster=self.conditions.cluster,
                    latents=self.latents,
                    latents_bytes=self.conditions.latents,
                ),
                size=lambda unit: self.sizes[unit],
                pinned=lambda unit: any(one.pinned for one in units[unit]),
                loaded=loaded,
            )

        places = {device.name: of(device.name, device.memory) for device in self.conditions.devices}
        return {**places, REMOTE: of("cpu", 1 << 62)}

    # --- answers

    def answers(self) -> Iterator[Answer]:
        """The answer of every line of the input, in its order; after ``run``."""
        for answer in self.answers_of(range(len(self)), len(self.stages)):
            if answer is None:
                raise AssertionError("a request that was never settled")
            yield answer

    def answers_of(self, rows: Iterable[int], stage: int) -> Iterator[Answer | None]:
        """Answers of requests; None of those that have not settled before that stage."""
        first, second = tee(rows)
        views = self.replays(row for row in second if row not in self.bad)
        for row in first:
            if row in self.bad:
                name, fault = self.bad[row]
                yield Answer(name, fault=fault, row=row)
                continue
            view = next(views)
            if row in self.decided.faults:
                fault = Fault(f"request {view.item.id}", self.decided.faults[row])
                yield Answer(view.item.id, fault=fault, row=row)
            else:
                yield view.answer(stage)

    def _emit_unasked(self, settled: Callable[[Answer], None] | None) -> None:
        if settled is not None:
            self._emit(settled, [row for row in range(len(self)) if self._unasked(row)], 0)

    def _unasked(self, row: int) -> bool:
        """Nobody is asked about it."""
        if row in self.bad:
            return True
        decision = self.decided.of(row)
        return decision is None or decision.abstains

    def _emit(self, settled: Callable[[Answer], None] | None, rows: Sequence[int], stage: int) -> None:
        if settled is None:
            return
        for answer in self.answers_of(rows, stage):
            if answer is not None:
                settled(answer)

    def report(self, *, failed: int = 0) -> Report:
        """What it took so far.

        Args:
            failed: requests without an answer.
        """
        return report(
            self.journal.events,
            self.setup.experts,
            naive_loads=self.naive_loads,
            requests=len(self),
            failed=failed,
        )

    def remove(self) -> None:
        """Take away the folder: the job is done and its answers are elsewhere."""
        self.decided.close()
        self.journal.remove()

    def close(self) -> None:
        self.decided.close()
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
