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
from mixmerge.engine.worker import Worker, inputs_of
from mixmerge.kernels import loops
from mixmerge.kernels.layout import BLOCK, HIGH_BINS, LOW_BINS, LOW_SHIFT
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

# Runs of a tensor that the sample reads, and elements of a run: rows differ, so many short runs say most.
RUNS, RUN = 256, 128
# The same where an adapter gives whole rows only; of a row, no more elements than this.
ROWS, ROW = 32, 1024
# Magnitudes that hold this share of the sample are counted, not gathered: bfloat16 deltas have few values.
CROWD, CROWDS = 1 / 64, 8


@dataclass
class _Wanted:
    """The j-th largest magnitude of one expert: a bracket for it, then its bits and index."""

    expert: int
    rank: int
    low: int = 0
    high: int = _TOP
    crowds: tuple[int, ...] = ()
    bits: int = -1
    index: int = -1


@dataclass(frozen=True)
class _Found:
    """One chunk's share of a bracket: how many are above it, how many of each crowd, and all others in it.

    ``bits`` and ``places`` (offsets in the chunk) are None where they are too many.
    """

    start: int
    above: int
    crowds: tuple[int, ...]
    bits: NDArray[np.uint32] | None
    places: NDArray[np.uint32] | None


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
    """Guess bounds from a sample; a wrong guess costs time, never the result."""
    experts = sorted({one.expert for one in asked})
    (samples,) = yield Pass(lambda worker, *_: _sample(worker, task, experts, elements), [(0, 0)])
    ordered = {k: np.sort(bits, axis=None) for k, bits in samples.items()}
    for one in asked:
        bits, runs = ordered[one.expert], samples[one.expert]
        size, share = len(bits), 1 - one.rank / elements
        middle = bits[min(size - 1, int(share * size))]
        # Entries of a run may be alike: what tells the error is how much the runs' shares differ.
        spread = float((runs < middle).mean(axis=1).std()) / math.sqrt(len(runs))
        margin = 3.5 * max(spread, math.sqrt(share * (1 - share) / size)) + 0.0005
        low, high = int((share - margin) * size), int((share + margin) * size)
        one.low = int(bits[low]) if share > margin else 0
        one.high = int(bits[high]) if high < size else _TOP
        values, counts = np.unique(bits[(bits >= one.low) & (bits <= one.high)], return_counts=True)
        largest = np.argsort(counts, kind="stable")[::-1][:CROWDS]
        one.crowds = tuple(sorted(int(values[i]) for i in largest if counts[i] >= CROWD * size and values[i]))


def _sample(worker: Worker, task: Task, experts: list[int], elements: int) -> dict[int, NDArray[np.uint32]]:
    """Magnitudes of every expert, a row for each run."""
    if not any(source.adapter for source in inputs_of(task)):
        worker.sample(task, [(elements - RUN) * run // (RUNS - 1) for run in range(RUNS)], RUN)
        return {k: _magnitudes(worker, k + 1, RUNS * RUN).reshape(RUNS, RUN) for k in experts}
    kept: dict[int, list[NDArray[np.uint32]]] = {k: [] for k in experts}
    row = math.prod(task.target.shape[1:])
    for run in range(ROWS):
        first = (elements - row) * run // (ROWS - 1) // row * row
        worker.load(task, first, first + row)
        for k in experts:
            kept[k].append(_magnitudes(worker, k + 1, min(row, ROW)))
    return {k: np.stack(parts) for k, parts in kept.items()}


def _magnitudes(worker: Worker, row: int, n: int) -> NDArray[np.uint32]:
    deltas = np.empty(n, np.float32)
    loops.deltas(worker.raw, worker.codes, worker.direct, row, 0, deltas, worker.scratch[0])
    return deltas.view(np.uint32) & np.uint32(_TOP)


def _collect(task: Task, asked: list[_Wanted], pieces: list[tuple[int, int]]) -> Steps:
    """Count above every bracket and in its crowds, and gather the rest of what is inside."""
    for one in asked:
        # A zero changes nothing, kept or not: that many ties need not be told apart.
        one.low = max(one.low, 1)
        one.high = max(one.high, one.low)
    experts = np.array([one.expert + 1 for one in asked], np.int64)
    low = np.array([one.low for one in asked], np.uint32)
    high = np.array([one.high for one in asked], np.uint32)
    sizes = np.array([len(one.crowds) for one in asked], np.int64)
    crowds = np.zeros((len(asked), CROWDS), np.uint32)
    for at, one in enumerate(asked):
        crowds[at, : sizes[at]] = one.crowds
    # Where the sample misled, what is gathered could be the tensor: beyond this it is counted instead.
    share = 1 if len(pieces) == 1 else 8

    def collect(worker: Worker, number: int, start: int, stop: int) -> list[_Found]:
        worker.load(task, start, stop)
        count, room = len(asked), (stop - start) // share
        above, found = np.zeros(count, np.int64), np.zeros(count, np.int64)
        counted = np.zeros((count, CROWDS), np.int64)
        bits = worker.extra("found_bits", (count, worker.length + BLOCK), np.uint32)
        places = worker.extra("found_places", (count, worker.length + BLOCK), np.uint32)
        flags = worker.extra("flags", (BLOCK,), np.uint8)
        loops.collect_chunk(
            worker.raw, worker.codes, worker.direct, stop - start, experts, low, high, crowds, sizes,
            above, counted, found, room, bits, places, worker.scratch, flags,
        )  # fmt: skip
        results = []
        for j, size in enumerate(map(int, found)):
            few = (bits[j, :size].copy(), places[j, :size].copy()) if size <= room else (None, None)
            results.append(_Found(start, int(above[j]), tuple(map(int, counted[j, : sizes[j]])), *few))
        return results

    parts = yield Pass(collect, pieces)
    for at, one in enumerate(asked):
        yield from _settle(task, one, [part[at] for part in parts], pieces)


def _settle(task: Task, one: _Wanted, found: list[_Found], pieces: list[tuple[int, int]]) -> Steps:
    """The bits and index that are wanted, if the bracket holds them and all of it was gathered."""
    gathered = [part.bits for part in found if part.bits is not None]
    if len(gathered) < len(found):
        return
    bits, rank = np.concatenate(gathered), one.rank - sum(part.above for part in found)
    held = len(bits) + sum(sum(part.crowds) for part in found)
    if rank > held and one.low <= 1:
        one.bits, one.index = 0, LAST
        return
    if not 1 <= rank <= held:
        return
    for at in reversed(range(len(one.crowds))):
        crowd, counts = one.crowds[at], [(part.crowds[at], -1) for part in found]
        above, ties = int(np.count_nonzero(bits > np.uint32(crowd))), sum(count for count, _ in counts)
        if rank <= above:
            break
        if rank <= above + ties:
            one.bits, one.index = crowd, LAST
            if rank < above + ties:
                one.index = yield from tie_index(task, one.expert, crowd, rank - above, counts, pieces)
            return
        rank -= ties
    value = np.partition(bits, len(bits) - rank)[len(bits) - rank]
    nth = rank - int(np.count_nonzero(bits > value))
    # Ties are in the order of their indices: chunks and blocks are.
    one.bits, one.index = int(value), _index_of(int(np.flatnonzero(bits == value)[nth - 1]), found)


def _index_of(position: int, found: list[_Found]) -> int:
    """The index in the tensor of one of all that was gathered, counted from the first chunk on."""
    for part in found:
        places = () if part.places is None else part.places
        if position < len(places):
            return part.start + int(places[position])
        position -= len(places)
    raise IndexError(position)


def locate(bins: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest of a histogram, and how many are in the bins above it."""
    from_top = np.cumsum(bins[::-1])
    position = int(np.searchsorted(from_top, k))
    return len(bins) - 1 - position, int(from_top[position - 1]) if position else 0


def _by_histogram(task: Task, one: _Wanted, pieces: list[tuple[int, int]]) -> Steps:
    """Two passes of histograms find the magnitude, two of counting the last of its ties that is kept."""
    lock = threading.Lock()
    high = np.zeros(HIGH_BINS, np.int64)
    yield histogram_pass(task, one.expert, -1, high, pieces, lock)
    prefix, above = locate(high, one.rank)
    low = np.zeros(LOW_BINS, np.int64)
    yield histogram_pass(task, one.expert, prefix, low, pieces, lock)
    suffix, more = locate(low, one.rank - above)
    one.bits = prefix << LOW_SHIFT | suffix
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
    """Add one expert's magnitudes to ``bins``, under ``lock``; see ``loops.histogram_chunk``."""

    def count(worker: Worker, number: int, start: int, stop: int) -> None:
        worker.load(task, start, stop, expert=expert)
        mine = np.zeros(len(bins), np.int64)
        loops.histogram_chunk(
            worker.raw, worker.codes, worker.direct, stop - start, expert + 1, prefix, mine, worker.scratch
        )
        with lock:
            np.add(bins, mine, out=bins)

    return Pass(count, pieces)


def ties_pass(task: Task, expert: int, bits: int, wanted: list[int], pieces: list[tuple[int, int]]) -> Pass:
    """How many magnitudes equal ``bits`` in every chunk, and where the ``wanted``-th of each is."""

    def count(worker: Worker, number: int, start: int, stop: int) -> tuple[int, int]:
        worker.load(task, start, stop, expert=expert)
        result = np.zeros(2, np.int64)
        loops.ties_chunk(
            worker.raw, worker.codes, worker.direct, stop - start, expert + 1, bits, wanted[number],
            worker.scratch, result,
        )  # fmt: skip
        return int(result[0]), int(result[1])

    return Pass(count, pieces)
