"""DELLA's keep-probabilities from ranks within rows, without sorting most rows.

A row's entries are ranked by (|delta|, -index), ascending from 0; entry of rank r is kept when its draw is below
    2**32 * ((density - epsilon) + 2 * epsilon * r / (n - 1)).
Whether a draw decides depends on the exact rank only when the thresholds of the lowest and the highest rank an
entry can have, given a histogram of the row, lie on both sides of it. Those few are ranked by counting; a row
with many of them (few distinct magnitudes) is sorted.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, LANES, _add_magnitudes, _sum_lanes, delta_block
from mixmerge.kernels.random import draw_block

U8, U32, U64, F32, F64 = np.uint8, np.uint32, np.uint64, np.float32, np.float64
_ABS = U32(0x7FFFFFFF)
# Arrays used as indices are unsigned: numba then leaves out the test for negative ones.
# Bins of a row's histogram: one for about 16 entries. Finer ones cost more to clear and to sum than they
# save: what is left to rank one by one is mostly ties.
MIN_BINS, MAX_BINS, PER_BIN = 128, 512, 16
# Up to this many entries of a row are ranked by counting, one by one; with more, the row is sorted.
MANY = 192
RADIX = 1 << 11
_DIGIT = U32(RADIX - 1)


@njit(nogil=True, cache=True)
def _deltas(raw, codes, direct, expert, start, delta, base):
    for s in range(0, delta.size, BLOCK):
        m = min(BLOCK, delta.size - s)
        if not direct[expert]:
            decode(codes[0], raw[0], start + s, base[:m])
        delta_block(raw, codes, direct, expert, start + s, base[:m], delta[s : s + m])


@njit(nogil=True, cache=True)
def _draws(stream, start, draws, lanes):
    for s in range(0, draws.size, BLOCK):
        draw_block(stream, start + s, draws[s : s + min(BLOCK, draws.size - s)], lanes)


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
def _bin_rows(bits, values, bins, keys):
    """A monotone map of |delta| to ``bins`` bins, linear in the value. Returns False for a row of zeros, and for
    one with NaN or Inf, which the pass that writes refuses."""
    top = U32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & _ABS)
    if top == U32(0) or top >= U32(0x7F800000):
        return False
    largest = _as_float(top)
    factor, last = F32(bins) / largest, np.int32(bins - 1)
    if not np.isfinite(factor):
        factor = F32(0)  # a row of subnormals: one bin, and the sort decides
    for i in range(keys.size):
        keys[i] = U32(min(np.int32(abs(values[i]) * factor), last))
    return True


@njit(nogil=True, cache=True)
def _as_float(bits):
    one = np.empty(1, np.uint32)
    one[0] = bits
    return one.view(np.float32)[0]


@njit(nogil=True, cache=True)
def _count(keys, even, odd, starts):
    """``starts[b]`` entries have a key below b. Two histograms keep equal neighbours from waiting."""
    bins = even.size
    for b in range(bins):
        even[b] = 0
        odd[b] = 0
    half = keys.size // 2
    for i in range(half):
        even[keys[2 * i]] += 1
        odd[keys[2 * i + 1]] += 1
    if keys.size & 1:
        even[keys[keys.size - 1]] += 1
    total = np.int32(0)
    for b in range(bins):
        starts[b] = total
        total += even[b] + odd[b]
    starts[bins] = total


@njit(nogil=True, cache=True)
def _bounds(starts, low, span, least, most):
    """Draws below ``least[b]`` keep an entry of bin b whatever its rank there; not below ``most[b]``, none."""
    for b in range(least.size):
        least[b] = np.int64(np.ceil(low + span * starts[b]))
        most[b] = np.int64(np.ceil(low + span * (starts[b + 1] - 1)))


@njit(nogil=True, cache=True)
def _undecided(draws, always, never, keep, places):
    """Decide what any rank decides (limits as of ``_limit``); the others' places."""
    low, span = U32(min(always, 0xFFFFFFFF)), U32(max(never - always - 1, 0))
    for i in range(draws.size):
        keep[i] = U8(draws[i] < low)
    count = U64(0)
    for i in range(draws.size):
        places[count] = U32(i)
        count += U64((draws[i] - low) <= span)
    return count


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _count_below(bits, bound):
    # Whole numbers below 2**24 add exactly in float32 in any order, and float32 vectorises.
    count = F32(0)
    for i in range(bits.size):
        count += F32(1) if (bits[i] & _ABS) < bound else F32(0)
    return np.int64(count)


@njit(nogil=True, cache=True)
def _rank(bits, i):
    """Entries below entry ``i`` in the order: the smaller ones, and the equal ones after it."""
    mine, rank = bits[i] & _ABS, np.int64(0)
    for s in range(0, i, BLOCK):
        rank += _count_below(bits[s : min(s + BLOCK, i)], mine)
    for s in range(i, bits.size, BLOCK):
        rank += _count_below(bits[s : min(s + BLOCK, bits.size)], mine + U32(1))
    return rank - 1


@njit(nogil=True, cache=True)
def _radix_pass(bits, shift, counts, source, target):
    for c in range(counts.size):
        counts[c] = 0
    for i in range(bits.size):
        counts[((bits[i] & _ABS) >> shift) & _DIGIT] += U32(1)
    total = U32(0)
    for c in range(counts.size):
        here = counts[c]
        counts[c] = total
        total += here
    for j in range(source.size):
        i = source[j]
        digit = ((bits[i] & _ABS) >> shift) & _DIGIT
        target[counts[digit]] = i
        counts[digit] += U32(1)


@njit(nogil=True, cache=True)
def sort_row(bits, counts, order, spare):
    """Indices of a row in the order (|delta|, -index): three stable radix passes. ``counts`` (RADIX),
    ``order`` and ``spare`` (n) are uint32."""
    n = bits.size
    for j in range(n):
        spare[j] = U32(n - 1 - j)
    _radix_pass(bits, U32(0), counts, spare, order)
    _radix_pass(bits, U32(11), counts, order, spare)
    _radix_pass(bits, U32(22), counts, spare, order)


@njit(nogil=True, cache=True)
def _keep_ranked(
    values, draws, density, epsilon, keep, keys, even, odd, starts, least, most, places, open_, counts
):
    n, bits = values.size, values.view(np.uint32)
    low, span = (density - epsilon) * 4294967296.0, 2 * epsilon * 4294967296.0 / (n - 1)
    if not _bin_rows(bits, values, even.size, keys):
        for i in range(n):
            keep[i] = 0  # zeros add nothing, kept or not
        return
    _count(keys, even, odd, starts)
    _bounds(starts, low, span, least, most)
    asked = _undecided(draws, np.int64(np.ceil(low)), np.int64(np.ceil(low + span * (n - 1))), keep, places)
    unsure = U64(0)
    for j in range(np.int64(asked)):
        i = places[j]
        u, b = np.int64(draws[i]), keys[i]
        keep[i] = U8(u < least[b])
        open_[unsure] = i
        # Zeros add nothing, so which of them are kept need not be known.
        unsure += U64((u >= least[b]) & (u < most[b]) & ((bits[i] & _ABS) != U32(0)))
    if unsure <= MANY:
        for j in range(np.int64(unsure)):
            i = np.int64(open_[j])
            keep[i] = U8(F64(draws[i]) < low + span * _rank(bits, i))
        return
    order = open_[:n]
    sort_row(bits, counts, order, places[:n])
    for r in range(n):
        keep[order[r]] = U8(F64(draws[order[r]]) < low + span * r)


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
def _mask_rows(delta, draws, row, density, epsilon, keep):
    bins = MIN_BINS
    while bins < MAX_BINS and bins * PER_BIN < row:
        bins *= 2
    keys, even, odd = np.empty(row, np.uint32), np.empty(bins, np.int32), np.empty(bins, np.int32)
    starts, least, most = np.empty(bins + 1, np.int32), np.empty(bins, np.int64), np.empty(bins, np.int64)
    places, open_ = np.empty(row + 1, np.uint32), np.empty(row + 1, np.uint32)
    counts = np.empty(RADIX, np.uint32)
    for s in range(0, delta.size, row):
        e = s + row
        if row == 1 or epsilon == 0.0:
            _keep_random(draws[s:e], _limit(density), keep[s:e])
        else:
            _keep_ranked(
                delta[s:e], draws[s:e], density, epsilon, keep[s:e], keys, even, odd, starts, least, most,
                places, open_, counts,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def mask_chunk(
    raw, codes, direct, n, first, row, expert, stream, density, epsilon, mask, delta, draws, keep, base, lanes
):
    """Draw the keep-mask of one expert's chunk into ``mask`` (bits) and sum |delta|: (all, kept).

    ``row`` is the length of a row for ranked masks (it divides n), or 0 for one probability everywhere.
    ``delta`` (n) float32, ``draws`` (n) uint32, ``keep`` (n) uint8 and ``base`` (B) are scratch.
    """
    delta, draws, keep = delta[:n], draws[:n], keep[:n]
    _deltas(raw, codes, direct, expert, 0, delta, base)
    _draws(stream, first, draws, lanes)
    if row == 0 or epsilon == 0.0:
        _keep_random(draws, _limit(density), keep)
    else:
        _mask_rows(delta, draws, row, density, epsilon, keep)
    _pack(keep, mask)
    every, kept = np.zeros(LANES), np.zeros(LANES)
    _add_magnitudes(delta, every)
    for i in range(n):
        delta[i] = delta[i] if keep[i] else F32(0)
    _add_magnitudes(delta, kept)
    return _sum_lanes(every), _sum_lanes(kept)


@njit(nogil=True, cache=True)
def inverse_chunk(
    raw, codes, direct, n, first, row, expert, stream, density, epsilon, draws, base, lanes, delta
):
    """Sparsify one expert's chunk into ``delta`` (n), what is kept over its own keep-probability."""
    delta, draws = delta[:n], draws[:n]
    _deltas(raw, codes, direct, expert, 0, delta, base)
    _draws(stream, first, draws, lanes)
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
