"""Thresholds over a whole model (``scope: model``): histograms of every expert's delta, summed over tensors.

Source: TIES-Merging (arXiv:2306.01708), algorithm 1: the top k of the flattened task vector. No experts x
parameters matrix is made. Entries of equal magnitude are kept in the order of sorted tensor names, then index.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.engine.cuts import (
    LAST,
    LOOSE,
    NEVER,
    NOTHING,
    Cut,
    histogram_pass,
    locate,
    tie_index,
    ties_pass,
)
from mixmerge.engine.schedule import Job, Schedule
from mixmerge.engine.worker import Worker, chunk_length, chunks
from mixmerge.kernels.layout import HIGH_BINS, LOW_BINS, LOW_SHIFT
from mixmerge.plan import Task


def model_cuts(tasks: Sequence[Task], workers: Sequence[Worker]) -> dict[str, list[Cut]]:
    """For every task, the cut of each of its experts; densities are the same in all tasks."""
    ordered = sorted(tasks, key=lambda task: task.target.name)
    densities = ordered[0].parameters["density"] if ordered else ()
    experts = range(len(densities)) if isinstance(densities, tuple) else range(0)
    elements = sum(math.prod(task.target.shape) for task in ordered)
    kept = [max(1, int(float(density or 0) * elements)) if density else 0 for density in densities]  # type: ignore[union-attr]
    bits, missing = _thresholds(ordered, experts, kept, elements, workers)
    cuts: dict[str, list[Cut]] = {task.target.name: [] for task in ordered}
    for k in experts:
        for name, cut in _cuts_of(ordered, k, bits[k], missing[k], kept[k], elements, workers).items():
            cuts[name].append(cut)
    return cuts


def _run(
    tasks: Sequence[Task], workers: Sequence[Worker], job: Callable[[Task, list[tuple[int, int]]], Job]
) -> None:
    def jobs() -> Iterator[tuple[Job, Callable[[], None]]]:
        for task in tasks:
            yield job(task, chunks(task, chunk_length(task, rows_whole=False))), lambda: None

    Schedule(jobs(), workers).run()


def _thresholds(
    tasks: Sequence[Task], experts: range, kept: list[int], elements: int, workers: Sequence[Worker]
) -> tuple[list[int], list[int]]:
    """Every expert's magnitude at rank ``kept``, and how many entries of just that magnitude are kept."""
    high = np.zeros((len(experts), HIGH_BINS), np.int64)
    low = np.zeros((len(experts), LOW_BINS), np.int64)
    prefixes, lock = [-1] * len(experts), threading.Lock()

    def histograms(bins: NDArray[np.int64]) -> Callable[[Task, list[tuple[int, int]]], Job]:
        def job(task: Task, pieces: list[tuple[int, int]]) -> Job:
            for k in experts:
                if 0 < kept[k] < elements:
                    yield histogram_pass(task, k, prefixes[k], bins[k], pieces, lock)

        return job

    _run(tasks, workers, histograms(high))
    above = [0] * len(experts)
    for k in experts:
        if 0 < kept[k] < elements:
            prefixes[k], above[k] = locate(high[k], kept[k])
    _run(tasks, workers, histograms(low))
    bits, missing = [0] * len(experts), [0] * len(experts)
    for k in experts:
        if 0 < kept[k] < elements:
            suffix, more = locate(low[k], kept[k] - above[k])
            bits[k] = prefixes[k] << LOW_SHIFT | suffix
            missing[k] = kept[k] - above[k] - more
    return bits, missing


def _cuts_of(
    tasks: Sequence[Task],
    k: int,
    bits: int,
    missing: int,
    kept: int,
    elements: int,
    workers: Sequence[Worker],
) -> dict[str, Cut]:
    if kept == 0 or kept >= elements or bits == 0:
        whole = NOTHING if kept == 0 else LOOSE
        return {task.target.name: whole for task in tasks}
    ties: dict[str, list[Any]] = {}

    def count(task: Task, pieces: list[tuple[int, int]]) -> Job:
        ties[task.target.name] = yield ties_pass(task, k, bits, [0] * len(pieces), pieces)

    _run(tasks, workers, count)
    cuts = {}
    for task in tasks:
        here = sum(part[0] for part in ties[task.target.name])
        if missing >= here:
            cuts[task.target.name] = Cut(bits, LAST, NEVER, -1)
        elif missing <= 0:
            cuts[task.target.name] = Cut(bits, -1, NEVER, -1)
        else:
            cuts[task.target.name] = _partial(task, k, bits, missing, ties[task.target.name], workers)
        missing -= here
    return cuts


def _partial(task: Task, k: int, bits: int, wanted: int, counts: list[Any], workers: Sequence[Worker]) -> Cut:
    index: list[int] = []

    def find(task: Task, pieces: list[tuple[int, int]]) -> Job:
        index.append((yield from tie_index(task, k, bits, wanted, counts, pieces)))

    _run([task], workers, find)
    return Cut(bits, index[0], NEVER, -1)
