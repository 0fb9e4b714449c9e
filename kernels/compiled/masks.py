"""Random keep-masks of a chunk as bits (DARE, DELLA), and DELLA's deltas over their own keep-probabilities."""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.compiled.combine import _sum_lanes, deltas_chunk
from mixmerge.kernels.compiled.random import draw_block, halves_of_draws
from mixmerge.kernels.compiled.ranks import keep_ranked, sort_row
from mixmerge.kernels.layout import BLOCK, LANES, RADIX

U8, U16, F32, F64 = np.uint8, np.uint16, np.float32, np.float64
# Entries worked on at a time.
PIECE = 1 << 14


@njit
def _draws(stream, start, draws, words):
    for s in range(0, draws.size, BLOCK):
        draw_block(stream, start + s, draws[s : s + min(BLOCK, draws.size - s)], words)


@njit
def _keep_random(stream, start, p, keep, halves, words):
    """Flag the draws below ``p * 2**32``, from their upper halves wherever these decide."""
    limit = np.int64(np.ceil(p * 4294967296.0))
    if limit > np.int64(0xFFFFFFFF):
        keep[:] = U8(1)
        return
    bound, rest = U16(limit >> 16), U16(limit & 0xFFFF)
    for s in range(0, keep.size, BLOCK):
        m = min(BLOCK, keep.size - s)
        part, flags = halves[:m], keep[s : s + m]
        halves_of_draws(stream, start + s, 0, part, words)
        if _below(part, bound, flags) and rest > U16(0):
            for i in range(m):
                if part[i] == bound:
                    lower = halves[m : m + 1]
                    halves_of_draws(stream, start + s + i, 1, lower, words)
                    flags[i] = U8(lower[0] < rest)


@njit
def _below(halves, bound, keep):
    """Flag what is below; returns whether anything equals the bound."""
    equal = U8(0)
    for i in range(halves.size):
        keep[i] = U8(halves[i] < bound)
        equal |= U8(halves[i] == bound)
    return equal != U8(0)


@njit
def _pack(keep, mask):
    """Eight flags of 0 or 1 to a byte, lowest bit first."""
    whole = keep.size // 8
    words = keep[: 8 * whole].view(np.uint64)
    for j in range(whole):
        # The product moves flag i from bit 8 i to bit 56 + i, and no two terms meet.
        mask[j] = U8((words[j] * np.uint64(0x0102040810204080)) >> np.uint64(56))
    if 8 * whole < keep.size:
        byte = U8(0)
        for i in range(8 * whole, keep.size):
            byte |= U8(keep[i] << U8(i - 8 * whole))
        mask[whole] = byte


@njit
def _add_kept(values, keep, every, kept):
    """Add |value| to ``every``, and to ``kept`` where it is kept, in lanes."""
    whole = values.size // LANES * LANES
    for s in range(0, whole, LANES):
        part, flags = values[s : s + LANES], keep[s : s + LANES]
        for i in range(LANES):
            magnitude = F64(abs(part[i]))
            every[i] += magnitude
            kept[i] += magnitude if flags[i] else F64(0)
    for i in range(whole, values.size):
        every[i - whole] += F64(abs(values[i]))
        kept[i - whole] += F64(abs(values[i])) if keep[i] else F64(0)


@njit
def mask_chunk(
    raw, codes, direct, n, first, row, expert, stream, density, epsilon, mask, delta, draws, keep, base, words,
    ranks, lanes, sums,
):  # fmt: skip
    """Draw the keep-mask of one expert's chunk into ``mask`` (bits) and sum |delta| into ``sums``: (all, kept).

    ``row`` is the length of a row for ranked masks (it divides n), or 0 for one probability everywhere. Scratch:
    ``delta`` (n) float32, ``draws`` (n) uint32, ``keep`` (n) uint8, ``base`` (B), ``words`` as in ``draw_block``,
    ``ranks`` (``layout.rank_words(row)``) uint32, ``lanes`` (2, LANES).
    """
    ranked = row > 1 and epsilon > 0.0
    length = row if ranked else 1
    every, kept = lanes[0], lanes[1]
    every[:] = kept[:] = 0
    # Whole rows and whole bytes of the mask, few enough to stay in the cache from draw to sum.
    step = length * max(1, PIECE // length)
    if step % 8:
        step *= 8
    for s in range(0, n, step):
        m = min(step, n - s)
        part, drawn, flags = delta[:m], draws[:m], keep[:m]
        deltas_chunk(raw, codes, direct, expert, s, part, base)
        if ranked:
            _draws(stream, first + s, drawn, words)
            for r in range(0, m, row):
                e = r + row
                keep_ranked(part[r:e], drawn[r:e], density, epsilon, flags[r:e], ranks)
        else:
            _keep_random(stream, first + s, density, flags, draws.view(np.uint16), words)
        _pack(flags, mask[s // 8 :])
        _add_kept(part, flags, every, kept)
    sums[0], sums[1] = _sum_lanes(every), _sum_lanes(kept)


@njit
def inverse_chunk(
    raw, codes, direct, n, first, row, expert, stream, density, epsilon, draws, keep, base, words, ranks, delta,
):  # fmt: skip
    """Sparsify one expert's chunk into ``delta`` (n), what is kept over its own keep-probability. Scratch as in
    ``mask_chunk``."""
    delta, draws, keep = delta[:n], draws[:n], keep[:n]
    deltas_chunk(raw, codes, direct, expert, 0, delta, base)
    # x - x is 0, or NaN where the input is not finite: the pass that writes has to see it.
    if row <= 1 or epsilon == 0.0:
        _keep_random(stream, first, density, keep, draws.view(np.uint16), words)
        for i in range(n):
            delta[i] = delta[i] * F32(1 / density) if keep[i] else delta[i] - delta[i]
        return
    _draws(stream, first, draws, words)
    low, span = density - epsilon, 2 * epsilon / (row - 1)
    counts, order, spare = ranks[:RADIX], ranks[RADIX : RADIX + row], ranks[RADIX + row : RADIX + 2 * row]
    for s in range(0, n, row):
        part, flags = delta[s : s + row], keep[s : s + row]
        keep_ranked(part, draws[s : s + row], density, epsilon, flags, ranks)
        sort_row(part.view(np.uint32), counts, order, spare)
        for r in range(row):
            i = order[r]
            part[i] = part[i] * F32(1 / (low + span * r)) if flags[i] else part[i] - part[i]
