"""Sums over every tensor of base and experts: chunk by chunk, on a few threads, in a fixed order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from mixmerge.checkpoint.adapter import LoadedDelta
from mixmerge.checkpoint.files import Files, opened
from mixmerge.checkpoint.header import DTYPE_BYTES, TensorHeader
from mixmerge.errors import CheckpointError, Fault
from mixmerge.inspect.matching import Matched, Source
from mixmerge.kernels.compare import compare_reference
from mixmerge.kernels.layout import CODES, LANES
from mixmerge.kernels.layout import COMPARE_BLOCK as BLOCK
from mixmerge.kernels.loops import compare_chunk, decode

CHUNK = 1 << 18
_INFINITE = 0x7F800000
_AHEAD = 4  # chunks under way for each thread
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sums:
    """What is added up over entries; E experts.

    Args:
        elements: entries.
        square: the base's sum of squares.
        products: ``(E, E)`` float64, upper triangle: <delta i, delta j>.
        counts: ``(E, E)`` int64, upper triangle: entries of opposite sign; on the diagonal, zero entries.
        conflicts: entries that at least one expert raises and another lowers.
    """

    elements: int
    square: float
    products: NDArray[np.float64]
    counts: NDArray[np.int64]
    conflicts: int

    @classmethod
    def none(cls, experts: int) -> Sums:
        return cls(0, 0.0, np.zeros((experts, experts)), np.zeros((experts, experts), np.int64), 0)

    def plus(self, other: Sums) -> Sums:
        return Sums(
            self.elements + other.elements,
            self.square + other.square,
            self.products + other.products,
            self.counts + other.counts,
            self.conflicts + other.conflicts,
        )


@dataclass(frozen=True)
class _Job:
    """One tensor; its adapters are loaded when the first chunk needs them and go with the last."""

    tensor: Matched

    @cached_property
    def loaded(self) -> tuple[LoadedDelta | None, ...]:
        return tuple(source.adapter.load() if source.adapter else None for source in self.tensor.sources)

    @property
    def length(self) -> int:
        """Elements of a chunk: whole rows where an adapter gives them. Depends on nothing but the tensor."""
        columns = [source.adapter.shape[1] for source in self.tensor.sources if source.adapter]
        return max(columns[0], CHUNK // columns[0] * columns[0]) if columns and columns[0] else CHUNK

    def chunks(self) -> Iterator[tuple[_Job, int, int]]:
        for start in range(0, self.tensor.elements, self.length):
            yield self, start, min(start + self.length, self.tensor.elements)


class _Worker:
    """Buffers of one thread: a row for the base and one for each expert."""

    def __init__(self, files: Files, rows: int, length: int) -> None:
        self._files = files
        self._raw = np.empty((rows, 4 * length), np.uint8)
        self._weight = np.empty(length, np.float32)
        self._codes = np.zeros(rows, np.int64)
        self._direct = np.zeros(rows, np.uint8)
        self._values = np.empty((rows, BLOCK), np.float32)
        self._marks = np.empty((rows, BLOCK), np.uint8)
        self._lanes = np.empty(((rows - 1) ** 2 + 1, LANES))

    def sums(self, job: _Job, start: int, stop: int) -> Sums:
        """Elements ``start`` to ``stop`` of one tensor."""
        n, sources = stop - start, job.tensor.sources
        if any(source.header.dtype not in CODES for source in sources):
            return self._wide(job, start, stop)
        for row, source in enumerate(sources):
            self._fill(row, source, job.loaded[row], start, stop)
        experts = len(sources) - 1
        products = np.zeros((experts, experts))
        counts = np.zeros((experts, experts), np.int64)
        totals, seen = np.zeros(2), np.zeros(experts + 1, np.uint32)
        compare_chunk(
            self._raw, self._codes, self._direct, n, self._values, self._marks, self._lanes, products, counts, totals,
            seen,
        )  # fmt: skip
        for row, source in enumerate(sources):
            if seen[row] >= _INFINITE:
                values = self._weight[:n]
                decode(self._codes[row], self._raw[row], 0, values)
                raise _not_finite(source, start + int(np.argmin(np.isfinite(values))))
        return Sums(n, float(totals[0]), products, counts, int(totals[1]))

    def _fill(self, row: int, source: Source, loaded: LoadedDelta | None, start: int, stop: int) -> None:
        """One source as the kernel takes it: stored bytes, or float32 values, or a float32 delta."""
        raw, n = self._raw[row], stop - start
        floats = raw.view(np.float32)[:n]
        self._codes[row], self._direct[row] = CODES["F32"], source.same
        if source.same and loaded is None:
            floats[:] = 0
            return
        if loaded is None or not source.same or loaded.needs_weight:
            self._read(source.header, start, stop, raw)
            self._codes[row] = CODES[source.header.dtype]
        if loaded is None:
            return
        weight = self._weight[:n]
        columns = loaded.shape[1]
        if not source.same or loaded.needs_weight:
            decode(self._codes[row], raw, 0, weight)
        rows, out = (start // columns, stop // columns), floats.reshape(-1, columns)
        given = weight.reshape(-1, columns)
        if source.same:
            loaded.rows(*rows, given, out=out)
        else:
            loaded.expert(*rows, given, out=out)
        self._codes[row] = CODES["F32"]

    def _read(self, header: TensorHeader, start: int, stop: int, raw: NDArray[np.uint8]) -> None:
        width = DTYPE_BYTES[header.dtype]
        self._files.read(header, start * width, raw.data[: (stop - start) * width])

    def _wide(self, job: _Job, start: int, stop: int) -> Sums:
        """The same where a tensor is float64, without a kernel: such checkpoints are rare."""
        rows = [
            self._wide_row(source, loaded, start, stop)
            for source, loaded in zip(job.tensor.sources, job.loaded, strict=True)
        ]
        for source, values in zip(job.tensor.sources, rows, strict=True):
            if not np.isfinite(values).all():
                raise _not_finite(source, start + int(np.argmin(np.isfinite(values))))
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused in the end
            deltas = [
                values if source.same else values - rows[0]
                for source, values in zip(job.tensor.sources[1:], rows[1:], strict=True)
            ]
            products, counts, square, conflicts = compare_reference(rows[0], np.stack(deltas))
        return Sums(stop - start, square, products, counts, conflicts)

    def _wide_row(
        self, source: Source, loaded: LoadedDelta | None, start: int, stop: int
    ) -> NDArray[np.float64]:
        n = stop - start
        if source.same and loaded is None:
            return np.zeros(n)
        raw = np.empty(8 * n, np.uint8)
        self._read(source.header, start, stop, raw)
        if source.header.dtype == "F64":
            values = raw.view(np.float64)
        else:
            narrow = np.empty(n, np.float32)
            decode(CODES[source.header.dtype], raw, 0, narrow)
            values = narrow.astype(np.float64)
        if loaded is None:
            return values
        columns = loaded.shape[1]
        given = values.astype(np.float32).reshape(-1, columns)
        delta = loaded.rows(start // columns, stop // columns, given).reshape(-1).astype(np.float64)
        return delta if source.same else values + delta


def _not_finite(source: Source, element: int) -> CheckpointError:
    header = source.header
    with_adapter = " with its adapter" if source.adapter else ""
    return CheckpointError(
        Fault(
            str(header.file),
            f"tensor {header.name!r}{with_adapter} holds NaN or Inf (first at element {element:,})",
            run="The training that wrote it diverged: use an earlier checkpoint of it",
        )
    )


def sum_tensors(
    tensors: Sequence[Matched], *, threads: int, progress: Progress | None = None
) -> Mapping[str, Sums]:
    """The sums of every tensor, by name. Memory: a few chunks for each model and thread, and the results.

    Raises:
        CheckpointError: a file cannot be read, or holds NaN or Inf.
    """
    experts = len(tensors[0].sources) - 1
    jobs = [_Job(tensor) for tensor in tensors]
    results = {tensor.name: Sums.none(experts) for tensor in tensors}
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with ExitStack() as stack:
        files = stack.enter_context(opened())
        length = max(job.length for job in jobs)
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(threads):
            idle.put(_Worker(files, experts + 1, length))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        for (job, start, stop), sums in _in_order(pool, idle, jobs, ahead=_AHEAD * threads):
            name = job.tensor.name
            results[name] = results[name].plus(sums)
            done += job.tensor.nbytes * (stop - start) // job.tensor.elements
            if progress is not None:
                progress(done, total)
    for tensor in tensors:
        _check_range(tensor, results[tensor.name])
    return results


def _in_order(
    pool: ThreadPoolExecutor, idle: SimpleQueue[_Worker], jobs: Sequence[_Job], *, ahead: int
) -> Iterator[tuple[tuple[_Job, int, int], Sums]]:
    def run(job: _Job, start: int, stop: int) -> Sums:
        worker = idle.get()
        try:
            return worker.sums(job, start, stop)
        finally:
            idle.put(worker)

    waiting: deque[tuple[tuple[_Job, int, int], Future[Sums]]] = deque()
    try:
        for job in jobs:
            for chunk in job.chunks():
                waiting.append((chunk, pool.submit(run, *chunk)))
                if len(waiting) >= ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _check_range(tensor: Matched, sums: Sums) -> None:
    squares = [sums.square, *np.diagonal(sums.products)]
    for source, square in zip(tensor.sources, squares, strict=True):
        if not np.isfinite(square):
            what = f"tensor {tensor.name!r} has values too large for the norm of its difference to the base"
            raise CheckpointError(
                Fault(str(source.header.file), what, run="It is damaged: copy or download it again")
            )
