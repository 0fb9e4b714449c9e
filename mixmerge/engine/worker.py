"""One thread's buffers, allocated once, and how a chunk of a task gets into them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.checkpoint.adapter import AdapterDelta, LoadedDelta
from mixmerge.checkpoint.header import TensorHeader
from mixmerge.errors import CheckpointError, Fault
from mixmerge.kernels.cast import CODES, WIDTHS, decode
from mixmerge.kernels.combine import BLOCK
from mixmerge.kernels.random import BLOCKS
from mixmerge.plan import Plan, Source, Task
from mixmerge.plan.report import CHUNK, task_rows


class Files:
    """Open input files, shared by all threads; every read is positioned."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, header: TensorHeader, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start`` of a tensor.

        Raises:
            CheckpointError: the disk or the file does not give the bytes; names file and byte.
        """
        at = header.offset + start
        try:
            handle = self._handle(header.file)
            while buffer:
                count = os.preadv(handle, [buffer], at)
                if count == 0:
                    end = os.fstat(handle).st_size
                    what = f"it ends at byte {end:,}, inside tensor {header.name!r}: it was changed during the merge"
                    raise CheckpointError(Fault(str(header.file), what))
                at += count
                buffer = buffer[count:]
        except OSError as error:
            what = f"cannot be read at byte {at:,} (tensor {header.name!r}): {error.strerror}"
            raise CheckpointError(
                Fault(str(header.file), what, run="Check the disk, or copy the file again")
            ) from error

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


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


@contextmanager
def opened() -> Iterator[Files]:
    files = Files()
    try:
        yield files
    finally:
        files.close()


def chunk_length(task: Task, *, rows_whole: bool) -> int:
    """Elements of a chunk: a fixed function of the task, so that no result depends on threads.

    Args:
        task: the task.
        rows_whole: a row of the last dimension may not be cut.
    """
    shape, elements = task.target.shape, max(1, math.prod(task.target.shape))
    unit = 1
    if any(source.adapter for source in (*task.sources, *((task.base,) if task.base else ()))):
        unit = elements // max(1, shape[0])
    if rows_whole:
        unit = max(unit, shape[-1] if shape else 1)
    return max(unit, CHUNK // unit * unit)


def chunks(task: Task, length: int) -> list[tuple[int, int]]:
    elements = math.prod(task.target.shape)
    return [(start, min(start + length, elements)) for start in range(0, elements, length)]


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
        self.direct = np.zeros(rows, np.bool_)
        self.seen = np.zeros(rows + 1, np.uint32)
        self.scratch = np.empty((rows + 3, BLOCK), np.float32)
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
        return self.extra("words", (4 * BLOCKS,), np.uint32)

    def load(self, task: Task, start: int, stop: int) -> None:
        """Read elements ``start`` to ``stop`` of every input, unless they are the ones last read."""
        key = id(task), start, stop
        if self.loaded == key:
            return
        self.loaded = None
        sources: Sequence[Source] = (*((task.base,) if task.base else ()), *task.sources)
        for row, source in enumerate(sources):
            self._load_row(row, source, start, stop)
        self.loaded = key

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
