"""The compiled loops beside their plain references: casts, draws, sums, masks. Selection and merges: next files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mixmerge.engine import cuts
from mixmerge.kernels import loops
from mixmerge.kernels.compiled import combine, ranks
from mixmerge.kernels.layout import BLOCK, CODES, DRAW_BLOCKS, KEEP_CUT, LANES, rank_words
from mixmerge.kernels.loops import decode, draw_block, encode
from mixmerge.kernels.philox import Draw, draws
from mixmerge.methods import sparsify as sp

Floats = NDArray[np.float32]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LENGTHS = (1, 7, 4095, 4096, 4097)
ABS = np.uint32(0x7FFFFFFF)


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


# --- casts


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_decode_of_every_half(dtype: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    values = np.empty(1 << 16, np.float32)
    top = decode(CODES[dtype], raw, 0, values)
    expected = torch.from_numpy(raw).view(TORCH[dtype]).float().numpy()
    numbers = ~np.isnan(expected)
    assert np.array_equal(values.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(values[~numbers]).all()
    assert top >= 0x7F800000  # there are Infs and NaNs


def floats(bits: Sequence[int] | NDArray[np.uint32]) -> Floats:
    """Values by their bits; every NaN is the one that arithmetic makes, for others are seen in the inputs."""
    given = np.array(bits, np.uint32)
    return (
        np.where((given & ABS) > 0x7F800000, given & (1 << 31) | 0x7FC00000, given)
        .astype(np.uint32)
        .view(np.float32)
    )


def same_encoding(dtype: str, values: Floats) -> None:
    """Bits as torch rounds them; the return value tells whether anything written is not finite."""
    n, width = values.size, TORCH[dtype].itemsize
    target = np.zeros((n + 3) * width, np.uint8)
    top = encode(CODES[dtype], values.copy(), target, 3)
    expected = torch.from_numpy(values.copy()).to(TORCH[dtype])
    written = torch.from_numpy(target[3 * width :]).view(TORCH[dtype])
    numbers = ~expected.isnan()
    assert np.array_equal(raw_bytes(written[numbers]), raw_bytes(expected[numbers]))
    assert written[~numbers].isnan().all()
    assert (top >= 0x7F800000) == (not bool(written.isfinite().all()))
    assert not target[: 3 * width].any()


# Signs, subnormals of both sides, each halfway case of bfloat16 and float16 nearby, the largest, Inf.
EDGES = [
    sign | (high << 16) | low
    for sign in (0, 1 << 31)
    for high in (0, 1, 0x3300, 0x3380, 0x3780, 0x387F, 0x3880, 0x3F80, 0x477F, 0x4780, 0x7F7F, 0x7F80)
    for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xE000, 0xEFFF, 0xF000, 0xFFFF)
]


@pytest.mark.parametrize("dtype", CODES)
def test_encode_at_the_edges(dtype: str) -> None:
    same_encoding(dtype, floats(EDGES))
    finite = floats(EDGES)[np.isfinite(floats(EDGES)) & (np.abs(floats(EDGES)) < 60000)]
    same_encoding(dtype, finite)
    rng = np.random.default_rng(0)
    same_encoding(dtype, floats(rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)))
    same_encoding(dtype, (rng.standard_normal(20_000) * 2.0**-14).astype(np.float32))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), dtype=st.sampled_from(list(CODES)))
def test_encode_of_anything(bits: list[int], dtype: str) -> None:
    same_encoding(dtype, floats(bits))


# --- draws


@pytest.mark.parametrize("start", [0, 1, 3, 4096, 5_000_001, 2**34 - 8192, 2**34, 2**35 + 9])
@pytest.mark.parametrize("length", LENGTHS)
def test_draws_are_the_plain_ones(start: int, length: int) -> None:
    if start < 2**34 < start + length:
        length = 2**34 - start  # the low counter word wraps between calls, never inside one
    draw, lanes, found = (
        Draw(2**64 - 5, "a.weight"),
        np.empty(4 * DRAW_BLOCKS, np.uint32),
        np.empty(length, np.uint32),
    )
    stream = np.array([*draw.key, 65_535, *draw.name_words], np.uint32)
    draw_block(stream, start, found, lanes)
    expected = draws(draw, expert=65_535, start=start, stop=start + length)
    assert np.array_equal(found.astype(np.int64), expected.numpy())


@pytest.mark.parametrize("density", [0.5, 0.3, 1 / 3, 2**-16, 2**-16 + 2**-17, 2**-32, 1 - 2**-20])
def test_masks_of_one_chance_are_the_plain_ones(density: float) -> None:
    """In 300,000 draws about five have the upper half of the bound: there the lower halves decide."""
    delta, draw = np.ones((1, 300_000), np.float32), Draw(9, "w")
    mask, _, kept = drawn_mask(delta, 0, density, 0.0, 8 * 4096)
    plain = draws(draw, expert=3, start=8 * 4096, stop=8 * 4096 + delta.size).double() < density * 2.0**32
    assert np.array_equal(mask, plain.numpy())
    assert kept == plain.sum()


# --- sums in a fixed order


@pytest.mark.parametrize("n", [*LENGTHS, 63, 64, 65, 12_289])
def test_norms_and_products(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((2, n)).astype(np.float32)
    scratch, lanes, sums = np.empty((3, BLOCK), np.float32), np.empty((3, LANES)), np.empty(3)
    for dtype in CODES:
        pair = [torch.from_numpy(values).to(TORCH[dtype]) for values in (a, b)]
        wide, other = (tensor.double().numpy() for tensor in pair)
        stored = np.stack([raw_bytes(tensor) for tensor in pair])
        loops.products_chunk(stored, np.array([CODES[dtype]] * 2), n, scratch, lanes, sums)
        assert tuple(sums) == pytest.approx(
            (wide @ wide, other @ other, wide @ other), rel=1e-12, abs=1e-12 * n
        )
    raw, codes = np.stack([a, b]).view(np.uint8), np.array([2, 2])
    median = float(np.median(np.abs(b - a)))
    cut = np.array(cuts.Cut(int(np.float32(median).view(np.uint32)), cuts.LAST, cuts.NEVER, -1), np.int64)
    loops.magnitudes_chunk(
        raw, codes, np.zeros(2, np.uint8), n, 0, 1, KEEP_CUT, cut, np.zeros(1, np.uint8), scratch, lanes, sums
    )
    size = np.abs(b - a).astype(np.float64)
    assert sums[0] == pytest.approx(size.sum(), rel=1e-12)
    assert sums[1] == pytest.approx(size[size >= np.float32(median)].sum(), rel=1e-12)


# --- masks as bits


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=70),
    start=st.sampled_from([0, 8, 64]),
)
def test_bits_of_a_mask(mask: list[bool], start: int) -> None:
    keep = np.array(mask, np.uint8)
    bits = np.concatenate([np.zeros(start // 8, np.uint8), np.packbits(keep, bitorder="little")])
    delta = np.arange(1, len(mask) + 1, dtype=np.float32)
    combine.keep_bits(delta, bits, start, np.empty(BLOCK, np.float32))
    assert np.array_equal(delta != 0, keep.astype(np.bool_))


# --- random masks, of one chance or by rank within rows

values = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4028234663852886e38]),
)


def rows_of(kind: str, rows: int, row: int) -> Floats:
    """Rows of many equal magnitudes, of ones far apart, or all alike."""
    plain = np.random.default_rng(rows * row).standard_normal((rows, row))
    made = {
        "plain": plain,
        "tied": np.round(plain),  # a handful of distinct magnitudes
        "crowds": np.where(plain > 0.3, np.round(plain * 3), plain),
        "signs": np.sign(plain),
        "zeros": np.zeros((rows, row)),
        "outlier": np.where(np.arange(row) == row // 2, 1e6, plain),
        "outlier_tied": np.where(np.arange(row) == row // 2, 1e6, np.round(plain)),
        "subnormal": plain * 1e-41,
        "wide": np.sign(plain) * 10.0 ** (plain * 8),
        "falling": np.broadcast_to(np.arange(row, 0, -1), (rows, row)),
        "sparse": np.where(np.abs(plain) > 2, plain, 0),
    }
    return made[kind].astype(np.float32)


KINDS = (
    "plain",
    "tied",
    "crowds",
    "signs",
    "zeros",
    "outlier",
    "outlier_tied",
    "subnormal",
    "wide",
    "falling",
    "sparse",
)
CHANCES = [(0.5, 0.2), (0.9, 0.1), (0.05, 0.05), (0.5, 0.5), (0.3, 0.0)]


def drawn_mask(
    delta: Floats, row: int, density: float, epsilon: float, first: int
) -> tuple[Any, float, float]:
    """``mask_chunk`` over whole rows, and its two norms."""
    n, draw = delta.size, Draw(9, "w")
    raw = np.stack([np.zeros(n, np.float32), delta.reshape(-1)]).view(np.uint8)
    mask = np.zeros((n + 7) // 8 + 1, np.uint8)
    stream, sums = np.array([*draw.key, 3, *draw.name_words], np.uint32), np.empty(2)
    loops.mask_chunk(
        raw, np.array([2, 2]), np.array([0, 1], np.uint8), n, first, row, 1, stream, density, epsilon, mask,
        np.empty(n, np.float32), np.empty(n, np.uint32), np.empty(n, np.uint8), np.empty(BLOCK, np.float32),
        np.empty(4 * DRAW_BLOCKS, np.uint32), np.empty(rank_words(row), np.uint32), np.empty((2, LANES)), sums,
    )  # fmt: skip
    return np.unpackbits(mask, bitorder="little")[:n].astype(np.bool_), *map(float, sums)


def check_mask(delta: Floats, density: float, epsilon: float, *, first: int = 0) -> None:
    """Equal to the plain definition, which is asked for the entries before ``first`` too."""
    row, skipped = delta.shape[-1], first // delta.shape[-1]
    mask, every, kept = drawn_mask(delta, row, density, epsilon, first)
    padded = torch.from_numpy(np.concatenate([np.zeros((skipped, row), np.float32), delta]))
    expected = sp.sampled_by_rank(padded, density, epsilon, draw=Draw(9, "w"), expert=3)[skipped:].numpy()
    assert np.array_equal(mask.reshape(delta.shape), expected)
    assert every == pytest.approx(np.abs(delta.astype(np.float64)).sum(), rel=1e-12)
    assert kept == pytest.approx(np.abs(delta.astype(np.float64))[expected].sum(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_ranked_masks_equal_the_definition(kind: str) -> None:
    for (rows, row), (density, epsilon) in itertools.product(
        [(3, 1), (5, 2), (4, 7), (2, 4095), (1, 4097), (1, 9001), (40, 64)], CHANCES
    ):
        check_mask(rows_of(kind, rows, row), density, min(epsilon, density, 1 - density), first=row)


@given(
    delta=st.lists(values, min_size=2, max_size=60),
    density=st.floats(0.01, 0.99),
    share=st.floats(0, 1),
    skipped=st.integers(0, 3),
)
@settings(max_examples=150)
def test_ranked_masks_of_anything_equal_the_definition(
    delta: list[float], density: float, share: float, skipped: int
) -> None:
    finite = np.clip(np.array([delta], np.float32), -1e30, 1e30)
    check_mask(finite, density, share * min(density, 1 - density), first=skipped * len(delta))


@pytest.mark.parametrize("wide", [False, True])
def test_draws_between_two_limits(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX-512's compressing store, or what LLVM makes of it elsewhere, and one by one."""
    monkeypatch.setattr(ranks, "WIDE", wide)
    between, rng = numba.njit(ranks._between.py_func), np.random.default_rng(0)
    limits = [(0, 0), (0, 2**32 - 1), (2**31, 2**30), (2**32 - 5, 4)]
    for length, (low, span) in itertools.product((1, 15, 16, 17, 1000), limits):
        edges = [low, low + span, max(low - 1, 0), min(low + span + 1, 2**32 - 1)]
        given = rng.choice([*edges, *rng.integers(0, 2**32, 30)], length).astype(np.uint32)
        chosen = np.empty(length, np.uint32)
        found = between(given, np.uint32(low), np.uint32(span), chosen)
        expected = np.flatnonzero((given >= low) & (given <= low + span))
        assert np.array_equal(chosen[:found], expected)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_ranked_masks_survive_what_is_not_finite(bad: float) -> None:
    """The engine refuses such a tensor when it writes; until then nothing may be read or written out of bounds."""
    delta = rows_of("plain", 6, 640)
    delta[2, 5], delta[4, 600] = bad, bad
    mask, _, _ = drawn_mask(delta, 640, 0.5, 0.2, 0)
    clean, _, _ = drawn_mask(np.nan_to_num(delta, posinf=0, neginf=0), 640, 0.5, 0.2, 0)
    finite = np.isfinite(delta).all(axis=1)
    assert np.array_equal(mask.reshape(delta.shape)[finite], clean.reshape(delta.shape)[finite])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("density", "epsilon"), CHANCES)
def test_each_entry_over_its_own_chance(kind: str, density: float, epsilon: float) -> None:
    draw = Draw(9, "w")
    stream = np.array([*draw.key, 0, *draw.name_words], np.uint32)
    for rows, row in ((3, 1), (4, 7), (2, 4097)):
        delta, n = rows_of(kind, rows, row), rows * row
        raw = np.stack([np.zeros(n, np.float32), delta.reshape(-1)]).view(np.uint8)
        found = np.empty(n, np.float32)
        loops.inverse_chunk(
            raw, np.array([2, 2]), np.array([0, 1], np.uint8), n, 0, row, 1, stream, density, epsilon,
            np.empty(n, np.uint32), np.empty(n, np.uint8), np.empty(BLOCK, np.float32),
            np.empty(4 * DRAW_BLOCKS, np.uint32), np.empty(rank_words(row), np.uint32), found,
        )  # fmt: skip
        tensor = torch.from_numpy(delta)
        chance = sp.ranked(tensor, density, epsilon)
        mask = sp.sampled_by_rank(tensor, density, epsilon, draw=draw, expert=0)
        expected = sp.survivors(tensor, mask, rescale_by="inverse_p", p=chance)
        assert np.array_equal(found, expected.reshape(-1).numpy())
