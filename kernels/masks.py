"""Random keep-masks of a chunk as bits (DARE, DELLA), and DELLA's deltas over their own keep-probabilities."""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, LANES, _sum_lanes, delta_block
from mixmerge.kernels.random import draw_block
from mixmerge.kernels.ranks import RADIX, bin_count, keep_ranked, sort_row

U8, U32, F32, F64 = np.uint8, np.uint32, np.float32, np.float64
# Entries worked on at a time.
PIECE = 1 << 14


@njit(nogil=True, cache=True)
def _deltas(raw, codes, direct, expert, start, delta, base):
    for s in range(0, delta.size, BLOCK):
        m = min(BLOCK, delta.size - s)
        if not direct[expert]:
            decode(codes[0], raw[0], start + s, base[:m])
        delta_block(raw, codes, direct, expert, start + s, base[:m], delta[s : s + m])


@njit(nogil=True, cache=True)
def _draws(stream, start, draws, words):
    for s in range(0, draws.size, BLOCK):
        draw_block(stream, start + s, draws[s : s + min(BLOCK, draws.size - s)], words)


@njit(nogil=True, cache=True)
def _limit(p):
    """The least whole number that is not below ``p * 2**32``: a draw is kept when it is below this."""
    return np.int64(np.ceil(p * 4294967296.0))


@njit(nogil=True, cache=True)
def _keep_random(draws, limit, keep):
    if limit > np.int64(0xFFFFFFFF):
        keep[:] = U8(1)
        return
    bound = U32(limit)
    for i in range(draws.size):
        keep[i] = U8(draws[i] < bound)


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def mask_chunk(
    raw, codes, direct, n, first, row, expert, stream, density, epsilon, mask, delta, draws, keep, base, words
):
    """Draw the keep-mask of one expert's chunk into ``mask`` (bits) and sum |delta|: (all, kept).

    ``row`` is the length of a row for ranked masks (it divides n), or 0 for one probability everywhere.
    ``delta`` (n) float32, ``draws`` (n) uint32, ``keep`` (n) uint8 and ``base`` (B) are scratch.
    """
    ranked = row > 1 and epsilon > 0.0
    length = row if ranked else 1
    count = bin_count(length)
    entries, open_ = np.empty((4, length), np.uint32), np.empty(length + 8, np.uint8)
    starts, counts = np.empty(count + 1, np.uint32), np.empty((4, count), np.uint32)
    table, digits = np.empty(count, np.uint64), np.empty(RADIX, np.uint32)
    every, kept = np.zeros(LANES), np.zeros(LANES)
    # Whole rows and whole bytes of the mask, few enough to stay in the cache from draw to sum.
    step = length * max(1, PIECE // length)
    if step % 8:
        step *= 8
    for s in range(0, n, step):
        m = min(step, n - s)
        part, drawn, flags = delta[:m], draws[:m], keep[:m]
        _deltas(raw, codes, direct, expert, s, part, base)
        _draws(stream, first + s, drawn, words)
        if ranked:
            for r in range(0, m, row):
                e = r + row
                keep_ranked(
                    part[r:e],
                    drawn[r:e],
                    density,
                    epsilon,
                    flags[r:e],
                    entries,
                    open_,
                    starts,
                    counts,
                    table,
                    digits,
                )
        else:
            _keep_random(drawn, _limit(density), flags)
        _pack(flags, mask[s // 8 :])
        _add_kept(part, flags, every, kept)
    return _sum_lanes(every), _sum_lanes(kept)


@njit(nogil=True, cache=True)
def inverse_chunk(
    raw, codes, direct, n, first, row, expert, stream, density, epsilon, draws, base, words, delta
):
    """Sparsify one expert's chunk into ``delta`` (n), what is kept over its own keep-probability."""
    delta, draws = delta[:n], draws[:n]
    _deltas(raw, codes, direct, expert, 0, delta, base)
    _draws(stream, first, draws, words)
    if row <= 1 or epsilon == 0.0:
        for i in range(n):
            kept = F64(draws[i]) < density * 4294967296.0
            delta[i] = delta[i] * F32(1 / density) if kept else delta[i] - delta[i]
        return
    low, span = density - epsilon, 2 * epsilon / (row - 1)
    counts, order, spare = np.empty(RADIX, np.uint32), np.empty(row, np.uint32), np.empty(row, np.uint32)
    for s in range(0, n, row):
        part = delta[s : s + row]
        sort_row(part.view(np.uint32), counts, order, spare)
        for r in range(row):
            i, p = order[r], low + span * r
            # x - x is 0, or NaN where the input is not finite: the pass that writes has to see it.
            part[i] = part[i] * F32(1 / p) if F64(draws[s + i]) < p * 4294967296.0 else part[i] - part[i]
