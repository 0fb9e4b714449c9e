"""Answers of a mixture without files: to a list, as they finish, or word by word."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixmerge.batch.job import Job
from mixmerge.batch.opening import open_engine
from mixmerge.batch.plan import Stage
from mixmerge.batch.records import Answer, Item
from mixmerge.batch.running import record
from mixmerge.batch.setup import Conditions, Listed, Setup
from mixmerge.decision.records import Query
from mixmerge.engines.records import Generation, Message
from mixmerge.mixture.answering import setup_of
from mixmerge.mixture.wholes import whole_of

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture

Asked = str | Query | Item


@dataclass(frozen=True)
class Piece:
    """Some of an answer's text; the last one brings the whole ``answer``, and may have no text."""

    text: str
    answer: Answer | None = None


def items_of(asked: Iterable[Asked]) -> tuple[Item, ...]:
    """Requests: a text or query is a user's turn of a chat; a second one of a name gets ``-2`` behind it."""
    made: list[Item] = []
    seen: dict[str, int] = {}
    for one in asked:
        if isinstance(one, Item):
            made.append(one)
            continue
        query = one if isinstance(one, Query) else Query(one)
        count = seen[query.id] = seen.get(query.id, 0) + 1
        name = query.id if count == 1 else f"{query.id}-{count}"
        made.append(Item(name, (Message("user", query.text),), metadata=query.metadata))
    return tuple(made)


def answers(
    mixture: Mixture, asked: Iterable[Asked], *, conditions: Conditions | None = None
) -> list[Answer]:
    """An answer for each, in their order."""
    items = items_of(asked)
    if not items:
        return []
    with _job(items, setup_of(mixture), conditions) as job:
        job.run()
        return list(job.answers())


@contextmanager
def _job(
    items: tuple[Item, ...],
    setup: Setup,
    conditions: Conditions | None,
    stop: threading.Event | None = None,
) -> Iterator[Job]:
    """A job in a folder that is gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="mixmerge-") as work,
        Job(Listed(items), setup, Path(work), conditions, stop=stop) as job,
    ):
        yield job


async def as_finished(
    mixture: Mixture, asked: Iterable[Asked], *, conditions: Conditions | None = None
) -> AsyncIterator[Answer]:
    """Answers in the order they finish. Leaving the loop early stops the job after the batches at work."""
    items, setup = items_of(asked), setup_of(mixture)
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Answer | None]()
    stop = threading.Event()

    def tell(answer: Answer | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, answer)

    def work() -> None:
        try:
            with _job(items, setup, conditions, stop) as job:
                job.run(settled=tell)
        finally:
            tell(None)

    if not items:
        return
    running = asyncio.create_task(asyncio.to_thread(work))
    try:
        while (answer := await queue.get()) is not None:
            yield answer
        await running
    finally:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # it was raised above, or nobody waits for it


def stream(
    mixture: Mixture, asked: Asked, *, conditions: Conditions | None = None, explain: bool = False
) -> Iterator[Piece]:
    """One answer as it comes: word by word where one expert answers and its engine can, else whole."""
    with _job(items_of([asked]), setup_of(mixture, explain=explain), conditions) as job:
        job.decide()
        shown = ""
        kind = mixture.spec.compose.kind
        stage = job.next_stage() if kind == "answer" or whole_of(kind) is not None else None
        if stage is not None:
            for text in _words(job, stage):
                shown += text
                yield Piece(text)
        job.run()
        (answer,) = job.answers()
        yield Piece(answer.text.removeprefix(shown), answer)


def _words(job: Job, stage: Stage) -> Iterator[str]:
    """What the primary says, as it says it; it is written to the journal, where the job finds it."""
    call = len(stage) - 1  # who reads peers is asked after them
    request = next(job.replays([0])).asked(stage, call)
    name = job.setup.experts.names[int(stage.experts[call])]
    unit = job.setup.experts[name].unit
    engine = open_engine(
        job.setup.experts.units()[unit], device=job.conditions.devices[0].name, latents=job.latents
    )
    if "stream" not in engine.capabilities:
        return
    engine.prepare([request])
    with engine:
        if engine.check([request])[0] is not None:
            return
        start, generation = time.perf_counter(), None
        for chunk in engine.stream(request):
            if chunk.text:
                yield chunk.text
            generation = chunk.generation or generation
    if isinstance(generation, Generation):
        record(job.journal, stage, unit, [call], [generation], time.perf_counter() - start, [name])
