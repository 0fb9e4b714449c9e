"""Ways to read a big file: positioned reads into a reused buffer, or a map. From the page cache and from the disk."""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_BLOCK = 1 << 20

# Adding up stands for a kernel: every byte is looked at, as a merge does.


def _positioned(path: Path, start: int, stop: int) -> None:
    buffer = np.zeros(_BLOCK // 8, np.int64)
    with path.open("rb", buffering=0) as file:
        for at in range(start, stop, _BLOCK):
            count = os.preadv(file.fileno(), [buffer.data.cast("B")[: stop - at]], at)
            buffer[: count // 8].sum()


def _mapped(path: Path, start: int, stop: int) -> None:
    _map(path, start, stop, mmap.MAP_SHARED)


def _populated(path: Path, start: int, stop: int) -> None:
    _map(path, start, stop, mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _map(path: Path, start: int, stop: int, flags: int) -> None:
    length = stop - start
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), length, flags, mmap.PROT_READ, offset=start) as view,
    ):
        for at in range(0, length, _BLOCK):
            values = np.frombuffer(view, np.int64, min(_BLOCK, length - at) // 8, at)
            values.sum()
            del values  # a view keeps the map from closing


_READERS: dict[str, Callable[[Path, int, int], None]] = {
    "positioned reads, reused buffer": _positioned,
    "mmap": _mapped,
    "mmap, populated ahead": _populated,
}


def reading_rates(path: Path, *, rounds: int) -> dict[str, dict[str, float]]:
    """Median bytes a second of every way, alternated: circumstances -> way -> rate.

    Cold is this system's page cache only: a virtual machine's host may have the file.
    """
    found: dict[str, dict[str, float]] = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        for cold in (False, True):
            rates: dict[str, list[float]] = {name: [] for name in _READERS}
            for _ in range(rounds):
                for name, read in _READERS.items():
                    _forget(path) if cold else _positioned(path, 0, path.stat().st_size)
                    rates[name].append(_rate(read, path, threads))
            key = f"{'cold' if cold else 'warm'}, {threads} thread{'s' if threads > 1 else ''}"
            found[key] = {name: statistics.median(values) for name, values in rates.items()}
    return found


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rate(read: Callable[[Path, int, int], None], path: Path, threads: int) -> float:
    size = path.stat().st_size // 8 * 8
    share = max(1, size // threads // _BLOCK) * _BLOCK
    cuts = [min(size, number * share) for number in range(threads)] + [size]
    parts = [(start, stop) for start, stop in itertools.pairwise(cuts) if stop > start]
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for done in [pool.submit(read, path, start, stop) for start, stop in parts]:
            done.result()
        return size / (time.perf_counter() - began)
