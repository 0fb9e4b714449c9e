"""Exactly k entries without a sort: brackets from a sample, counting, histograms; each beside a real sort."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mixmerge.checkpoint.files import Files, opened
from mixmerge.checkpoint.header import TensorHeader
from mixmerge.engine import cuts, worker
from mixmerge.engine.kernels import band
from mixmerge.engine.schedule import Job, Schedule
from mixmerge.engine.worker import Adapters, Worker
from mixmerge.kernels import loops
from mixmerge.kernels.compiled import combine
from mixmerge.kernels.layout import BLOCK, HIGH_BINS, LOW_BINS, LOW_SHIFT
from mixmerge.plan import Source, Target, Task

Floats = NDArray[np.float32]
LENGTHS = (1, 7, 4095, 4096, 4097)
ABS = np.uint32(0x7FFFFFFF)


# --- one tensor in a file, as the engine reads it


def make_task(folder: Path, base: Tensor, experts: Sequence[Tensor]) -> Task:
    """A task over a raw file: float32 tensors, one after the other."""
    path, headers, offset = folder / "data", [], 0
    with path.open("wb") as file:
        for tensor in (base, *experts):
            file.write(tensor.numpy().tobytes())
            shape = tuple(tensor.shape)
            headers.append(TensorHeader("w", "F32", shape, path, offset, tensor.nbytes))
            offset += tensor.nbytes
    first, *others = (Source(number, header) for number, header in enumerate(headers))
    target = Target("w", tuple(base.shape), "F32", 0, 0, 4 * base.numel())
    return Task(target, tuple(others), first, False, {})


def workers_of(task: Task, files: Files, length: int, count: int = 1) -> list[Worker]:
    plan: Any = SimpleNamespace(tasks=[task])
    return [Worker(plan, files, Adapters(), length) for _ in range(count)]


def find_cuts(
    base: Tensor, experts: Sequence[Tensor], wanted: list[tuple[int, int]], *, length: int, threads: int = 1
) -> list[cuts.Cut]:
    """``order_statistics`` of one tensor, in chunks of ``length``."""
    found: list[cuts.Cut] = []
    with tempfile.TemporaryDirectory() as folder, opened() as files:
        task = make_task(Path(folder), base, experts)
        pieces = worker.chunks(task, length)

        def job() -> Job:
            found.extend((yield from cuts.order_statistics(task, wanted, pieces)))

        buffers = workers_of(task, files, max(length, cuts.RUNS * cuts.RUN), threads)
        Schedule(iter([(job(), lambda: None)]), buffers).run()
    return found


def kept_by(delta: Floats, cut: cuts.Cut) -> NDArray[np.bool_]:
    """Where ``keep_cut`` leaves an entry, block by block; zeros count as kept or not, whichever."""
    kept = delta.copy()
    for start in range(0, delta.size, BLOCK):
        combine.keep_cut(kept[start : start + BLOCK], start, np.array(cut, np.int64))
    return kept != 0


def by_sorting(delta: Floats, dropped: int, kept: int) -> NDArray[np.bool_]:
    """The plain definition: entries in falling order of (|delta|, -index)."""
    order = np.lexsort((np.arange(delta.size), -np.abs(delta).astype(np.float64)))
    mask = np.zeros(delta.size, np.bool_)
    mask[order[dropped : dropped + kept]] = True
    return mask & (delta != 0)


def check_cuts(
    deltas: Sequence[Floats], wanted: list[tuple[int, int]], *, length: int, threads: int = 1
) -> None:
    base = torch.zeros(deltas[0].size)
    experts = [torch.from_numpy(delta) for delta in deltas]
    found = find_cuts(base, experts, wanted, length=length, threads=threads)
    for delta, (dropped, kept), cut in zip(deltas, wanted, found, strict=True):
        assert np.array_equal(kept_by(delta, cut), by_sorting(delta, dropped, kept))


# --- exact selection

values = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4028234663852886e38]),
)


@given(numbers=st.lists(values, min_size=1, max_size=40), data=st.data(), length=st.integers(1, 50))
@settings(max_examples=150)
def test_selection_equals_a_sort(numbers: list[float], data: st.DataObject, length: int) -> None:
    """In tiny chunks, from a sample of three entries: brackets, fallback and ties all take part."""
    delta = np.array(numbers, np.float32)
    dropped = data.draw(st.integers(0, delta.size))
    kept = data.draw(st.integers(0, delta.size - dropped))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "RUNS", 3)
        patch.setattr(cuts, "RUN", 1)
        check_cuts([delta], [(dropped, kept)], length=length)


@pytest.mark.parametrize("length", [4096, 5000, 1 << 18])
def test_selection_over_blocks_and_chunks(length: int) -> None:
    rng = np.random.default_rng(1)
    for n in (*LENGTHS, 12_289):
        plain = rng.standard_normal(n).astype(np.float32)
        tied = np.round(plain * 2) / 2
        wanted = [
            band(n, density, gamma) for density, gamma in ((0.2, 0.0), (0.5, 0.1), (1.0, 0.0), (0.0, 0.0))
        ]
        for one in wanted:
            check_cuts([plain, tied, np.zeros(n, np.float32)], [one] * 3, length=length, threads=2)


SAMPLED = 200_003  # large enough for a sample, prime: the last chunk and the last run are cut


@pytest.fixture
def histograms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that had to be found by histograms."""
    seen: list[int] = []
    real = cuts._by_histogram

    def watched(task: Task, one: Any, pieces: list[tuple[int, int]]) -> Iterator[Any]:
        seen.append(one.rank)
        return real(task, one, pieces)

    monkeypatch.setattr(cuts, "_by_histogram", watched)
    return seen


def crowd() -> Floats:
    """Nine of ten entries have one magnitude, of both signs."""
    rng = np.random.default_rng(4)
    delta = np.where(rng.random(SAMPLED) < 0.5, np.float32(0.25), np.float32(-0.25)).astype(np.float32)
    delta[::10] = rng.standard_normal(len(delta[::10])).astype(np.float32)
    return delta


def sparse() -> Floats:
    """One entry in fifty is not zero: fewer than are to be kept."""
    delta = np.zeros(SAMPLED, np.float32)
    delta[::50] = np.random.default_rng(5).standard_normal(len(delta[::50])).astype(np.float32)
    return delta


def test_a_fair_sample_needs_no_histogram(histograms: list[int]) -> None:
    delta = np.random.default_rng(2).standard_normal(SAMPLED).astype(np.float32)
    for density, gamma in ((0.2, 0.0), (0.9, 0.05), (0.001, 0.001), (0.99999, 0.0)):
        check_cuts([delta], [band(SAMPLED, density, gamma)], length=30_000, threads=2)
    assert histograms == []


WANTED = [band(SAMPLED, density, gamma) for density, gamma in ((0.5, 0.0), (0.3, 0.2), (0.6, 0.1))]


def test_a_crowd_of_one_magnitude_is_counted(histograms: list[int]) -> None:
    check_cuts([crowd()] * 3, WANTED, length=30_000, threads=2)
    assert histograms == []


def test_bfloat16_deltas_are_crowds(histograms: list[int]) -> None:
    """Differences of bfloat16 numbers have few values: many entries are tied wherever the cut falls."""
    rng = np.random.default_rng(6)
    scales = np.exp(rng.standard_normal((SAMPLED // 1000 + 1, 1)) / 2).repeat(1000, 1).reshape(-1)[:SAMPLED]
    base = torch.from_numpy(rng.standard_normal(SAMPLED) * 0.02).bfloat16()
    moved = (base.double() + torch.from_numpy(rng.standard_normal(SAMPLED) * scales * 0.0004)).bfloat16()
    check_cuts([(moved.float() - base.float()).numpy()] * 3, WANTED, length=30_000, threads=2)
    assert histograms == []


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1e-8), (0.5, 0.5), (1e9, 1e10), (0.0, 0.0), (0.0, 1e10)])
def test_a_sample_that_misleads_costs_time_only(
    monkeypatch: pytest.MonkeyPatch, histograms: list[int], low: float, high: float
) -> None:
    def lie(task: Task, asked: Sequence[Any], elements: int) -> Iterator[Any]:
        for one in asked:
            one.low, one.high = (int(np.float32(value).view(np.uint32)) for value in (low, high))
        yield from ()

    monkeypatch.setattr(cuts, "_bracket", lie)
    delta = np.random.default_rng(3).standard_normal(SAMPLED).astype(np.float32)
    check_cuts([delta, crowd(), sparse()], WANTED, length=30_000, threads=2)
    assert histograms


def test_more_kept_than_is_not_zero(histograms: list[int]) -> None:
    wanted = [band(SAMPLED, density, gamma) for density, gamma in ((0.5, 0.0), (0.019, 0.0), (0.3, 0.5))]
    check_cuts([sparse()] * 3, wanted, length=30_000)
    assert histograms == []


def test_histograms_and_ties_by_counting() -> None:
    delta = np.round(np.random.default_rng(6).standard_normal(9001) * 4).astype(np.float32) / 4
    bits, scratch = delta.view(np.uint32) & ABS, np.empty((2, BLOCK), np.float32)
    raw, codes = np.stack([np.zeros(9001, np.float32), delta]).view(np.uint8), np.array([2, 2])
    direct, found = np.array([0, 1], np.uint8), np.empty(2, np.int64)
    bins = np.zeros(HIGH_BINS, np.int64)
    loops.histogram_chunk(raw, codes, direct, 9001, 1, -1, bins, scratch)
    assert np.array_equal(bins, np.bincount(bits >> LOW_SHIFT, minlength=HIGH_BINS))
    for k in (1, 500, 9001):
        prefix, above = cuts.locate(bins, k)
        low = np.zeros(LOW_BINS, np.int64)
        loops.histogram_chunk(raw, codes, direct, 9001, 1, prefix, low, scratch)
        suffix, more = cuts.locate(low, k - above)
        assert prefix << LOW_SHIFT | suffix == np.sort(bits)[9001 - k]
        places = np.flatnonzero(bits == np.sort(bits)[9001 - k])
        nth = k - above - more
        loops.ties_chunk(raw, codes, direct, 9001, 1, prefix << LOW_SHIFT | suffix, nth, scratch, found)
        assert tuple(found) == (len(places), places[nth - 1])
