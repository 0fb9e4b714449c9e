"""One thread's buffers, allocated once, and how a chunk of a task gets into them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.checkpoint.adapter import AdapterDelta, LoadedDelta
from mixmerge.checkpoint.files import Files
from mixmerge.kernels.layout import BLOCK, CODES, DRAW_BLOCKS, LANES, WIDTHS
from mixmerge.kernels.loops import decode
from mixmerge.plan import Plan, Source, Task
from mixmerge.plan.report import CHUNK, task_rows


class Adapters:
    """Adapter factors, read once when first needed."""

    def __init__(self) -> None:
        self._loaded: dict[int, LoadedDelta] = {}
        self._lock = threading.Lock()

    def get(self, delta: AdapterDelta) -> LoadedDelta:
        with self._lock:
            if id(delta) not in self._loaded:
                self._loaded[id(delta)] = delta.load()
            return self._loaded[id(delta)]


def chunk_length(task: Task, *, rows_whole: bool) -> int:
    """Elements of a chunk: a fixed function of the task, so that no result depends on threads.

    Args:
        task: the task.
        rows_whole: a row of the last dimension may not be cut.
    """
    shape, elements = task.target.shape, max(1, math.prod(task.target.shape))
    unit = 1
    if any(source.adapter for source in inputs_of(task)):
        unit = elements // max(1, shape[0])
    if rows_whole:
        unit = max(unit, shape[-1] if shape else 1)
    return max(unit, CHUNK // unit * unit)


def chunks(task: Task, length: int) -> list[tuple[int, int]]:
    elements = math.prod(task.target.shape)
    return [(start, min(start + length, elements)) for start in range(0, elements, length)]


def inputs_of(task: Task) -> tuple[Source, ...]:
    """The base where there is one, then the experts: the rows of a worker's buffers."""
    return (*((task.base,) if task.base else ()), *task.sources)


class Worker:
    """Buffers of one thread.

    ``raw`` (E, bytes) holds the inputs of a chunk as stored, row 0 the base where there is one; ``codes`` (E) their
    dtypes; ``direct`` (E) which rows are float32 deltas already; ``out`` the result as it will be written.
    """

    def __init__(self, plan: Plan, files: Files, adapters: Adapters, length: int) -> None:
        rows = max((task_rows(task) for task in plan.tasks), default=1)
        self._files, self._adapters = files, adapters
        self._rows, self.length = rows, length
        self.raw = np.empty((rows, 4 * length), np.uint8)
        self.out = np.empty(4 * length, np.uint8)
        self.codes = np.zeros(rows, np.int64)
        self.direct = np.zeros(rows, np.uint8)
        self.seen = np.zeros(rows + 1, np.uint32)
        self.scratch = np.empty((rows + 4, BLOCK), np.float32)
        self.lanes = np.empty((3, LANES))
        self.values = np.empty(length, np.float32)
        self.loaded: tuple[int, int, int] | None = None
        self._extra: dict[str, NDArray[Any]] = {}

    def extra(self, name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        """A buffer only some methods need, made at first use."""
        if name not in self._extra or self._extra[name].shape != shape:
            self._extra[name] = np.empty(shape, dtype)
        return self._extra[name]

    @property
    def words(self) -> NDArray[Any]:
        return self.extra("words", (4 * DRAW_BLOCKS,), np.uint32)

    def load(self, task: Task, start: int, stop: int, *, expert: int | None = None) -> None:
        """Read elements ``start`` to ``stop`` of every input, unless they are the ones last read.

        With ``expert``, the base and that one expert are enough: the others' rows keep what was in them.
        """
        key = id(task), start, stop
        if self.loaded == key:
            return
        self.loaded = None
        for row, source in enumerate(inputs_of(task)):
            if expert is None or row in (0, expert + 1):
                self._load_row(row, source, start, stop)
        self.loaded = key if expert is None else None

    def sample(self, task: Task, starts: Sequence[int], length: int) -> None:
        """Read the ``length`` elements from each of ``starts``, of every input, as if they were one chunk."""
        self.loaded = None
        for row, source in enumerate(inputs_of(task)):
            width = WIDTHS[source.tensor.dtype]
            self.codes[row], self.direct[row] = CODES[source.tensor.dtype], False
            places = [start * width for start in starts]
            self._files.read_runs(source.tensor, places, length * width, self.raw[row].data)

    def _load_row(self, row: int, source: Source, start: int, stop: int) -> None:
        self.codes[row], self.direct[row] = CODES[source.tensor.dtype], False
        if not source.delta_only:
            self._read_stored(row, source, start, stop)
        if source.adapter is not None:
            self._adapt(row, source, source.adapter, start, stop)

    def _read_stored(self, row: int, source: Source, start: int, stop: int) -> None:
        width = WIDTHS[source.tensor.dtype]
        self._files.read(source.tensor, start * width, self.raw[row].data[: (stop - start) * width])

    def _adapt(self, row: int, source: Source, adapter: AdapterDelta, start: int, stop: int) -> None:
        loaded = self._adapters.get(adapter)
        columns = source.tensor.elements // source.tensor.shape[0]
        rows, n = (start // columns, stop // columns), stop - start
        values = self.values[:n].reshape(-1, columns)
        if loaded.needs_weight or not source.delta_only:
            if source.delta_only:
                self._read_stored(row, source, start, stop)
            decode(self.codes[row], self.raw[row], 0, self.values[:n])
        target = self.raw[row].view(np.float32)[:n].reshape(-1, columns)
        if source.delta_only:
            loaded.rows(*rows, values if loaded.needs_weight else None, out=target)
        else:
            loaded.expert(*rows, values, out=target)
        self.codes[row], self.direct[row] = CODES["F32"], source.delta_only
