"""Where to cut a delta so that exactly k entries stay: sampled brackets, one counting pass, histograms if need be."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixmerge.engine.schedule import Pass
from mixmerge.engine.worker import Worker
from mixmerge.kernels import select
from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, delta_block
from mixmerge.plan import Task

NEVER = 0xFFFFFFFF
LAST = (1 << 62) - 1
_TOP = 0x7FFFFFFF


class Cut(NamedTuple):
    """Kept is what is at least (low_bits, low_index) and below (high_bits, high_index) in the order of entries.

    Entries are ordered by |delta|, equal ones by falling index: an entry (bits, index) is at least (b, i) if
    ``bits > b`` or ``bits == b and index <= i``.
    """

    low_bits: int
    low_index: int
    high_bits: int
    high_index: int


LOOSE = Cut(0, LAST, NEVER, -1)
NOTHING = Cut(NEVER, -1, NEVER, -1)

Steps = Generator[Pass, list[Any], Any]

# Runs of a tensor that the sample reads, and elements of a run.
RUNS, RUN = 16, 2048


@dataclass
class _Wanted:
    """The j-th largest magnitude of one expert: a bracket for it, then its bits and index."""

    expert: int
    rank: int
    low: int = 0
    high: int = _TOP
    bits: int = -1
    index: int = -1


@dataclass(frozen=True)
class _Found:
    above: int
    count: int
    bits: NDArray[np.uint32] | None
    index: NDArray[np.int64] | None


def order_statistics(
    task: Task, wanted: list[tuple[int, int]], pieces: list[tuple[int, int]]
) -> Generator[Pass, list[Any], list[Cut]]:
    """The cuts that drop the ``wanted[k][0]`` largest entries of expert k and keep the next ``wanted[k][1]``."""
    elements = math.prod(task.target.shape)
    asked: list[_Wanted] = []
    for k, (dropped, kept) in enumerate(wanted):
        if kept and dropped + kept < elements:
            asked.append(_Wanted(k, dropped + kept))
        if kept and dropped:
            asked.append(_Wanted(k, dropped))
    if asked:
        if len(pieces) > 1 and elements >= RUNS * RUN:
            yield from _bracket(task, asked, elements)
        yield from _collect(task, asked, pieces)
        for one in asked:
            if one.bits < 0:
                yield from _by_histogram(task, one, pieces)
    places = {(one.expert, one.rank): (one.bits, one.index) for one in asked}
    cuts = []
    for k, (dropped, kept) in enumerate(wanted):
        low = places.get((k, dropped + kept), (0, LAST)) if kept else (NEVER, -1)
        high = places.get((k, dropped), (NEVER, -1)) if kept else (NEVER, -1)
        cuts.append(Cut(*low, *high))
    return cuts


def _bracket(task: Task, asked: list[_Wanted], elements: int) -> Steps:
    """Guess bounds from a few runs spread over the tensor; a wrong guess costs time, never the result."""
    experts = sorted({one.expert for one in asked})

    def sample(worker: Worker, number: int, start: int, stop: int) -> dict[int, NDArray[np.uint32]]:
        kept: dict[int, list[NDArray[np.uint32]]] = {k: [] for k in experts}
        unit = _run_unit(task)
        for run in range(RUNS):
            first = (elements - unit) * run // (RUNS - 1) // unit * unit
            worker.load(task, first, first + unit)
            for k in experts:
                kept[k].append(_magnitudes(worker, k + 1, min(unit, RUN)))
        return {k: np.sort(np.concatenate(parts)) for k, parts in kept.items()}

    (samples,) = yield Pass(sample, [(0, 0)])
    for one in asked:
        bits = samples[one.expert]
        size = len(bits)
        share = one.rank / elements
        # Runs are rows of a matrix, and rows differ: wider than independent draws would need.
        margin = 4 * math.sqrt(share * (1 - share) / size) + 0.002
        low = int((1 - share - margin) * size)
        high = int((1 - share + margin) * size)
        one.low = int(bits[low]) if low >= 0 else 0
        one.high = int(bits[high]) if high < size else _TOP


def _run_unit(task: Task) -> int:
    """Elements of one run, or whole rows where an adapter gives rows only."""
    inputs = (*task.sources, *((task.base,) if task.base else ()))
    if not any(source.adapter for source in inputs):
        return RUN
    row = math.prod(task.target.shape[1:])
    return row * max(1, RUN // row)


def _magnitudes(worker: Worker, row: int, n: int) -> NDArray[np.uint32]:
    base, parts = worker.scratch[0], []
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        delta = np.empty(m, np.float32)
        decode(worker.codes[0], worker.raw[0], s, base[:m])
        delta_block(worker.raw, worker.codes, worker.direct, row, s, base[:m], delta)
        parts.append(delta.view(np.uint32) & np.uint32(_TOP))
    return np.concatenate(parts)


def _collect(task: Task, asked: list[_Wanted], pieces: list[tuple[int, int]]) -> Steps:
    """Count above every bracket and gather what is inside."""
    for one in asked:
        # A zero changes nothing, kept or not: that many ties need not be told apart.
        one.low = max(one.low, 1)

    experts = np.array([one.expert + 1 for one in asked], np.int64)
    low = np.array([one.low for one in asked], np.uint32)
    high = np.array([one.high for one in asked], np.uint32)
    # Crowds of one magnitude would need as much memory as the tensor: beyond this they are counted instead.
    share = 1 if len(pieces) == 1 else 4

    def collect(worker: Worker, number: int, start: int, stop: int) -> list[_Found]:
        worker.load(task, start, stop)
        count = len(asked)
        above, found = np.zeros(count, np.int64), np.zeros(count, np.int64)
        room = (stop - start) // share + BLOCK
        bits = worker.extra("found_bits", (count, worker.length + BLOCK), np.uint32)
        places = worker.extra("found_places", (count, worker.length + BLOCK), np.uint32)
        spare = worker.extra("places", (BLOCK + 1,), np.uint32)
        select.collect_chunk(
            worker.raw, worker.codes, worker.direct, stop - start, experts, low, high, above, found,
            room, bits, places, worker.scratch, spare,
        )  # fmt: skip
        results = []
        for j in range(count):
            few = int(found[j]) <= room - BLOCK
            kept = (
                (bits[j, : found[j]].copy(), places[j, : found[j]] + np.int64(start)) if few else (None, None)
            )
            results.append(_Found(int(above[j]), int(found[j]), *kept))
        return results

    parts = yield Pass(collect, pieces)
    for at, one in enumerate(asked):
        _settle(one, [part[at] for part in parts])


def _settle(one: _Wanted, found: list[_Found]) -> None:
    rank = one.rank - sum(part.above for part in found)
    total = sum(part.count for part in found)
    if rank > total and one.low <= 1:
        one.bits, one.index = 0, LAST
        return
    if not 1 <= rank <= total or any(part.bits is None for part in found):
        return
    bits = np.concatenate([part.bits for part in found if part.bits is not None])
    index = np.concatenate([part.index for part in found if part.index is not None])
    value = np.partition(bits, total - rank)[total - rank]
    ties = index[bits == value]  # in rising order: chunks and blocks are
    one.bits = int(value)
    one.index = int(ties[rank - 1 - int((bits > value).sum())])


def _by_histogram(task: Task, one: _Wanted, pieces: list[tuple[int, int]]) -> Steps:
    """Two passes of histograms find the magnitude, two of counting the last of its ties that is kept."""
    lock = threading.Lock()
    high = np.zeros(select.HIGH_BINS, np.int64)
    yield histogram_pass(task, one.expert, -1, high, pieces, lock)
    prefix, above = select.locate(high, one.rank)
    low = np.zeros(select.LOW_BINS, np.int64)
    yield histogram_pass(task, one.expert, prefix, low, pieces, lock)
    suffix, more = select.locate(low, one.rank - above)
    one.bits = prefix << select.LOW_SHIFT | suffix
    counts = yield ties_pass(task, one.expert, one.bits, [0] * len(pieces), pieces)
    one.index = yield from tie_index(task, one.expert, one.bits, one.rank - above - more, counts, pieces)


def tie_index(
    task: Task, expert: int, bits: int, wanted: int, counts: list[Any], pieces: list[tuple[int, int]]
) -> Generator[Pass, list[Any], int]:
    """The index of the ``wanted``-th entry of magnitude ``bits``, given how many every chunk has."""
    for number, (count, _) in enumerate(counts):
        if wanted <= count:
            found = yield ties_pass(task, expert, bits, [wanted], [pieces[number]])
            return pieces[number][0] + int(found[0][1])
        wanted -= count
    raise RuntimeError("fewer ties than the histogram counted")


def histogram_pass(
    task: Task,
    expert: int,
    prefix: int,
    bins: NDArray[np.int64],
    pieces: list[tuple[int, int]],
    lock: threading.Lock,
) -> Pass:
    """Add one expert's magnitudes to ``bins``, under ``lock``; see ``select.histogram_chunk``."""

    def count(worker: Worker, number: int, start: int, stop: int) -> None:
        worker.load(task, start, stop)
        mine = np.zeros(len(bins), np.int64)
        select.histogram_chunk(
            worker.raw, worker.codes, worker.direct, stop - start, expert + 1, prefix, mine, worker.scratch
        )
        with lock:
            np.add(bins, mine, out=bins)

    return Pass(count, pieces)


def ties_pass(task: Task, expert: int, bits: int, wanted: list[int], pieces: list[tuple[int, int]]) -> Pass:
    """How many magnitudes equal ``bits`` in every chunk, and where the ``wanted``-th of each is."""

    def count(worker: Worker, number: int, start: int, stop: int) -> tuple[int, int]:
        worker.load(task, start, stop)
        result: tuple[int, int] = select.ties_chunk(
            worker.raw, worker.codes, worker.direct, stop - start, expert + 1, bits, wanted[number],
            worker.scratch,
        )  # fmt: skip
        return result

    return Pass(count, pieces)
