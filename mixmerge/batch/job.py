"""A job from end to end: read, decide, ask stage by stage, compose. What is in memory of a request are numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mixmerge.aggregate import Ask, Question, Said, Settled
from mixmerge.batch.costs import Report, report
from mixmerge.batch.decided import Decided
from mixmerge.batch.journal import Journal, key_of
from mixmerge.batch.opening import open_engine, size_of
from mixmerge.batch.placing import REMOTE, Placement, place
from mixmerge.batch.plan import Stage, estimated, groups, loads_in_order
from mixmerge.batch.records import Answer, Item
from mixmerge.batch.residence import Residence
from mixmerge.batch.running import Hooks, StageRun
from mixmerge.batch.setup import Conditions, Line, Setup, Source
from mixmerge.engines.records import Request
from mixmerge.errors import Fault, MixmergeError

Progress = Callable[[str, int, int], None]  # (what, done, in all)
MOST_STAGES = 64
ABSTAINS = "nobody is picked: the policy abstains"


class Job:
    """A job in a folder of its own, from which it goes on after a kill.

    Args:
        source: the requests.
        setup: who answers, and how.
        work: folder of the journal; made if it is not there.
        conditions: where it runs.
        progress: told how far it is.

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
    ) -> None:
        self.source, self.setup, self.work = source, setup, work
        self.conditions = conditions or Conditions()
        self._tell: Progress = progress or (lambda what, done, total: None)
        self.stop = threading.Event()
        self.stages: list[Stage] = []
        self.naive_loads = 0
        self._read()
        work.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(work / "journal.jsonl", job=self._about())
        self.decided = Decided(work / "decisions.jsonl", len(self._offsets))

    # --- the input

    def _read(self) -> None:
        lines = list(self._lines())
        if not lines:
            raise MixmergeError(Fault("input", "has no request", "One on each line"))
        self._offsets = np.array([offset for offset, _, _ in lines], np.int64)
        self.bad = {row: (name, fault) for row, (_, name, fault) in enumerate(lines) if fault is not None}

    def _lines(self) -> Iterator[tuple[int, str | None, Fault | None]]:
        for line in self.source.scan():
            yield line.offset, (line.id if line.fault else None), line.fault or self._unfit(line)

    def _unfit(self, line: Line) -> Fault | None:
        """What keeps a request from being asked at all."""
        if line.item is None or line.item.expert is None or line.item.expert in self.setup.experts.names:
            return None
        known = ", ".join(self.setup.experts.names)
        return Fault(
            f"line {line.number}: model", f"no expert is called {line.item.expert!r}", f"Known: {known}"
        )

    def _about(self) -> dict[str, Any]:
        return {
            "version": 1,
            "input": self.source.digest,
            "mixture": self.setup.identity,
            "batch_tokens": self.conditions.batch_tokens,
        }

    def item(self, row: int) -> Item:
        return self.source.read(int(self._offsets[row]))

    def __len__(self) -> int:
        return len(self._offsets)

    # --- decisions and stages

    def decide(self) -> None:
        """Decide who answers each request, unless a run before has."""
        good = [row for row in range(len(self)) if row not in self.bad]
        done = 0

        def more(count: int) -> None:
            nonlocal done
            done += count
            self._tell("deciding", done, len(good))

        items = ((row, self.item(row)) for row in good)
        self.decided.make(items, self.setup.route, whole=self.setup.whole, progress=more)

    def question(self, row: int) -> Question | None:
        """What a request asks, and of whom; None if nobody answers."""
        decision = self.decided.of(row)
        if decision is None or decision.abstains:
            return None
        return Question(decision.query_id, self.item(row).prompt, decision)

    def _step(self, row: int, stage: int) -> tuple[Ask, ...] | Settled | None:
        """What a request asks in a stage, or how it ended before; None if nobody answers."""
        question = self.question(row)
        if question is None:
            return None
        asks = self.setup.composition.first(question)
        said: list[tuple[Said, ...]] = []
        for number in range(stage):
            said.append(self._said(row, number, asks))
            following = self.setup.composition.then(question, said)
            if isinstance(following, Settled):
                return following
            asks = following
        return asks

    def _said(self, row: int, number: int, asks: Sequence[Ask]) -> tuple[Said, ...]:
        stage = self.stages[number]
        return tuple(
            self._one_said(stage, call, ask) for call, ask in zip(stage.calls_of(row), asks, strict=True)
        )

    def _one_said(self, stage: Stage, call: int, ask: Ask) -> Said:
        if stage.offsets[call] < 0:
            return Said(ask, "", None, stage.faults.get(call, "was not asked"))
        answer = self.journal.answer(int(stage.offsets[call]))
        logprobs = answer.get("logprobs")
        return Said(ask, answer["text"], None if logprobs is None else tuple(logprobs))

    def next_stage(self) -> Stage | None:
        """The next stage, with the answers that are in the journal; None if every request has settled."""
        number = len(self.stages)
        before = None if not number else self.stages[-1]
        rows = (
            [row for row in range(len(self)) if row not in self.bad]
            if before is None
            else np.unique(before.rows)
        )
        columns: list[tuple[int, int, int, int, int, int]] = []
        for row in (int(one) for one in rows):
            asks = self._step(row, number)
            if not isinstance(asks, tuple):
                continue
            for at, ask in enumerate(asks):
                request = self._request(row, ask)
                expert = self.setup.experts.names.index(ask.expert)
                texts = (
                    request.prompt if isinstance(request.prompt, str) else [m.content for m in request.prompt]
                )
                columns.append(
                    (row, at, expert, estimated(texts), request.max_new_tokens, _key(request, number, ask))
                )
        if not columns:
            return None
        if number >= MOST_STAGES:
            raise MixmergeError(Fault("compose", f"asks for more than {MOST_STAGES} stages"))
        rows_, places, experts, tokens, new = (np.array([c[i] for c in columns], np.int64) for i in range(5))
        keys = np.array([column[5] for column in columns], np.uint64)
        stage = Stage(number, rows_, places, experts, tokens, new, keys, self.journal.find(keys))
        self.stages.append(stage)
        self.naive_loads += loads_in_order(stage, self.setup.experts)
        return stage

    def _request(self, row: int, ask: Ask) -> Request:
        item, defaults = self.item(row), self.setup.defaults
        asked = item.settings
        temperature = ask.temperature
        if temperature is None:
            temperature = defaults.temperature if asked.temperature is None else asked.temperature
        expert = self.setup.experts[ask.expert]
        return Request(
            id=item.id,
            prompt=item.prompt if ask.prompt is None else ask.prompt,
            max_new_tokens=asked.max_new_tokens or defaults.max_new_tokens,
            temperature=temperature,
            top_p=defaults.top_p if asked.top_p is None else asked.top_p,
            stop=defaults.stop if asked.stop is None else asked.stop,
            seed=_seed(defaults.seed if asked.seed is None else asked.seed, ask.draw),
            logprobs=asked.logprobs or ask.logprobs,
            adapter=expert.name if expert.adapter is not None else None,
        )

    def request(self, call: int, stage: Stage) -> Request:
        """What is asked of an engine in a call."""
        row = int(stage.rows[call])
        asks = self._step(row, stage.number)
        if not isinstance(asks, tuple):
            raise AssertionError("a call of a request that has settled")
        return self._request(row, asks[int(stage.places[call])])

    # --- running

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Unit -> bytes."""
        return {unit: size_of(members) for unit, members in self.setup.experts.units().items()}

    def placements(self, stage: Stage, *, loaded: frozenset[str] = frozenset()) -> list[Placement]:
        """Which device runs what of a stage, in what order."""
        found = groups(
            stage,
            self.setup.experts,
            self.sizes,
            batch_tokens=self.conditions.batch_tokens,
            splits=self.journal.splits,
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
        left = np.bincount(stage.rows, weights=stage.offsets < 0, minlength=len(self)).astype(np.int64)
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
            lambda call: self.request(call, stage),
            self.journal,
            residences,
            self.setup.experts.names,
            Hooks(finished, self.stop, deadline),
        )
        run.run(self.placements(stage, loaded=loaded))

    def _residences(self) -> dict[str, Residence]:
        units = self.setup.experts.units()

        def of(device: str, memory: int) -> Residence:
            def loaded(unit: str, seconds: float) -> None:
                if not units[unit][0].remote:
                    self.journal.note({"load": unit, "device": device, "seconds": seconds})

            return Residence(
                memory,
                open_engine=lambda unit: open_engine(units[unit], device=device),
                size=lambda unit: self.sizes[unit],
                pinned=lambda unit: any(one.pinned for one in units[unit]),
                loaded=loaded,
            )

        places = {device.name: of(device.name, device.memory) for device in self.conditions.devices}
        return {**places, REMOTE: of("cpu", 1 << 62)}

    # --- answers

    def answers(self) -> Iterator[Answer]:
        """The answer of every line of the input, in its order; after ``run``."""
        for row in range(len(self)):
            answer = self.answer(row, len(self.stages))
            if answer is None:
                raise AssertionError("a request that was never settled")
            yield answer

    def answer(self, row: int, stage: int) -> Answer | None:
        """The answer of a request, if it has settled before that stage."""
        if row in self.bad:
            name, fault = self.bad[row]
            return Answer(name or "", fault=fault, row=row)
        decision = self.decided.of(row)
        item = self.item(row)
        where = f"request {item.id}"
        if decision is None:
            return Answer(
                item.id, fault=Fault(where, self.decided.faults.get(row, "was not decided")), row=row
            )
        if decision.abstains:
            fault = Fault(where, ABSTAINS, run="Lower abstain_below, or name a fallback")
            return Answer(item.id, decision=decision.as_dict(), fault=fault, row=row)
        outcome = self._step(row, stage)
        if not isinstance(outcome, Settled):
            return None
        return self._composed(row, item, outcome)

    def _composed(self, row: int, item: Item, settled: Settled) -> Answer:
        decision = self.decided.of(row)
        heard = [
            (stage.number, int(stage.places[call]), self.journal.answer(int(stage.offsets[call])))
            for stage in self.stages
            for call in stage.calls_of(row)
            if stage.offsets[call] >= 0
        ]
        source = self._source(row, settled)
        fault = None if settled.fault is None else Fault(f"request {item.id}", settled.fault)
        return Answer(
            item.id,
            settled.text,
            settled.expert,
            None if source is None else source["finish"],
            sum(one["tokens_in"] for _, _, one in heard),
            sum(one["tokens_out"] for _, _, one in heard),
            len(heard),
            self._cost([one for _, _, one in heard]),
            tuple(source["logprobs"]) if source and item.settings.logprobs and "logprobs" in source else None,
            {} if item.expert is not None or decision is None else decision.as_dict(),
            settled.reason,
            fault,
            row,
        )

    def _source(self, row: int, settled: Settled) -> dict[str, Any] | None:
        """The generation whose words the answer has."""
        if settled.source is None:
            return None
        number, expert, draw = settled.source
        asks, stage = self._step(row, number), self.stages[number]
        if not isinstance(asks, tuple):
            return None
        for call, ask in zip(stage.calls_of(row), asks, strict=True):
            if (ask.expert, ask.draw) == (expert, draw) and stage.offsets[call] >= 0:
                return self.journal.answer(int(stage.offsets[call]))
        return None

    def _cost(self, answers: Sequence[dict[str, Any]]) -> float | None:
        total = 0.0
        for one in answers:
            price = self.setup.experts[one["expert"]].price
            if price is None:
                return None
            total += (one["tokens_in"] * price.input + one["tokens_out"] * price.output) / 1e6
        return total

    def _emit_unasked(self, settled: Callable[[Answer], None] | None) -> None:
        rows = [row for row in range(len(self)) if row in self.bad or self.question(row) is None]
        self._emit(settled, rows, 0)

    def _emit(self, settled: Callable[[Answer], None] | None, rows: Sequence[int], stage: int) -> None:
        if settled is None:
            return
        for row in rows:
            answer = self.answer(row, stage)
            if answer is not None:
                settled(answer)

    def report(self) -> Report:
        """What it took so far."""
        failed = sum(1 for one in self.answers() if one.fault is not None)
        return report(
            self.journal.events,
            self.setup.experts,
            naive_loads=self.naive_loads,
            requests=len(self),
            failed=failed,
        )

    def remove(self) -> None:
        """Take away the folder: the job is done and its answers are elsewhere."""
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key(request: Request, stage: int, ask: Ask) -> int:
    """The name of an answer: whose, in which stage, and all that was asked."""
    prompt = (
        request.prompt if isinstance(request.prompt, str) else [[m.role, m.content] for m in request.prompt]
    )
    asked = replace(request, id="", prompt="asked")
    whole = json.dumps([prompt, repr(asked)], ensure_ascii=False)
    return key_of(request.id, stage, ask.expert, ask.draw, whole)


def _seed(seed: int, draw: int) -> int:
    """Another seed for every further draw."""
    if draw == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed} {draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
