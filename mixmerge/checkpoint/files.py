"""Open input files, shared by all threads. Every read is positioned, and says which file and byte it failed at."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mixmerge.checkpoint.header import TensorHeader
from mixmerge.errors import CheckpointError, Fault


class Files:
    """Files are opened when first read; see ``opened``."""

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
                    raise _short(header, os.fstat(handle).st_size)
                at += count
                buffer = buffer[count:]
        except OSError as error:
            raise _unreadable(header, at, error) from error

    def read_runs(self, header: TensorHeader, starts: Sequence[int], size: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the ``size`` bytes from each of ``starts`` of a tensor, one run after the other.

        Raises:
            CheckpointError: as ``read``.
        """
        offset = header.offset
        try:
            handle = self._handle(header.file)
            found = b"".join([os.pread(handle, size, offset + start) for start in starts])
            if len(found) < size * len(starts):
                raise _short(header, os.fstat(handle).st_size)
        except OSError as error:
            raise _unreadable(header, offset + starts[0], error) from error
        buffer[: len(found)] = found

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def _short(header: TensorHeader, end: int) -> CheckpointError:
    what = f"it ends at byte {end:,}, inside tensor {header.name!r}: it was changed meanwhile"
    return CheckpointError(Fault(str(header.file), what))


def _unreadable(header: TensorHeader, at: int, error: OSError) -> CheckpointError:
    what = f"cannot be read at byte {at:,} (tensor {header.name!r}): {error.strerror}"
    return CheckpointError(Fault(str(header.file), what, run="Check the disk, or copy the file again"))


@contextmanager
def opened() -> Iterator[Files]:
    """Files for the length of a block."""
    files = Files()
    try:
        yield files
    finally:
        files.close()
