"""DELLA's keep-probabilities from ranks within rows, without sorting most rows.

A row's entries are ranked by (|delta|, -index), ascending from 0; entry of rank r is kept when its draw is below
    2**32 * ((density - epsilon) + 2 * epsilon * r / (n - 1)).
Whether a draw decides depends on the exact rank only when the thresholds of the lowest and the highest rank an
entry can have, given a histogram of the row, lie on both sides of it. Those few are ranked by counting, within their
bins where they are more than a few; a row of crowds (few distinct magnitudes) is sorted.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, LANES, _sum_lanes, delta_block
from mixmerge.kernels.random import draw_block

U8, U32, U64, F32, F64 = np.uint8, np.uint32, np.uint64, np.float32, np.float64
_ABS = U32(0x7FFFFFFF)
# Arrays used as indices are unsigned: numba then leaves out the test for negative ones.
# Bins of a row's histogram: one for about 16 entries. Finer ones cost more to clear and to sum than they
# save: what is left to rank one by one is mostly ties.
MIN_BINS, MAX_BINS, PER_BIN = 128, 512, 16
# Up to FEW entries of a row are ranked against the whole row, more against their own bins; with more than MOST
# comparisons an entry of the row on average, the row is sorted.
FEW, MOST = 6, 8
RADIX = 1 << 11
# Entries worked on at a time.
PIECE = 1 << 14
_DIGIT = U32(RADIX - 1)


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
    for b in range(even.size):
        even[b] = U32(0)
        odd[b] = U32(0)
    half = keys.size // 2
    for i in range(half):
        even[keys[2 * i]] += U32(1)
        odd[keys[2 * i + 1]] += U32(1)
    if keys.size & 1:
        even[keys[keys.size - 1]] += U32(1)
    total = U32(0)
    for b in range(even.size):
        starts[b] = total
        total += U32(even[b] + odd[b])
    starts[even.size] = total


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
def _group(keys, starts, ends, order):
    """Indices by bin, rising within each: those of bin b are ``order[starts[b]:starts[b + 1]]``."""
    for b in range(ends.size):
        ends[b] = starts[b]
    for i in range(keys.size):
        key = keys[i]
        at = ends[key]
        order[at] = U32(i)
        ends[key] = U32(at + U32(1))


@njit(nogil=True, cache=True)
def _rank_in(bits, members, i):
    """Entries of one bin that are below its entry ``i``."""
    mine, rank = bits[i] & _ABS, U64(0)
    for m in range(members.size):
        j = members[m]
        other = bits[j] & _ABS
        rank += U64((other < mine) | ((other == mine) & (j > i)))
    return rank


@njit(nogil=True, cache=True)
def _keep_ranked(values, draws, density, epsilon, keep, entries, bins, limits, counts):
    """One row. ``entries`` (3, n + 1) uint32, ``bins`` (3, B + 1) uint32 and ``limits`` (2, B) int64 are scratch
    for B bins, ``counts`` (RADIX) uint32 for the sort."""
    n, bits = values.size, values.view(np.uint32)
    keys, places, unsure = entries[0][:n], entries[1], entries[2]
    starts, even, odd = bins[0], bins[1][:-1], bins[2][:-1]
    least, most = limits[0], limits[1]
    low, span = (density - epsilon) * 4294967296.0, 2 * epsilon * 4294967296.0 / (n - 1)
    if not _bin_rows(bits, values, even.size, keys):
        for i in range(n):
            keep[i] = 0  # zeros add nothing, kept or not
        return
    _count(keys, even, odd, starts)
    _bounds(starts, low, span, least, most)
    asked = _undecided(draws, np.int64(np.ceil(low)), np.int64(np.ceil(low + span * (n - 1))), keep, places)
    left, work = U64(0), U64(0)
    for j in range(np.int64(asked)):
        i = places[j]
        u, b = np.int64(draws[i]), keys[i]
        keep[i] = U8(u < least[b])
        unsure[left] = i
        # Zeros add nothing, so which of them are kept need not be known.
        open_ = U64((u >= least[b]) & (u < most[b]) & ((bits[i] & _ABS) != U32(0)))
        left += open_
        work += open_ * U64(starts[b + U32(1)] - starts[b])
    if left <= FEW:
        for j in range(np.int64(left)):
            i = np.int64(unsure[j])
            keep[i] = U8(F64(draws[i]) < low + span * _rank(bits, i))
    elif work <= U64(MOST * n):
        order = places[:n]
        _group(keys, starts, even, order)
        for j in range(np.int64(left)):
            i = unsure[j]
            first = starts[keys[i]]
            rank = first + _rank_in(bits, order[first : starts[keys[i] + U32(1)]], i)
            keep[i] = U8(F64(draws[i]) < low + span * rank)
    else:
        order = unsure[:n]
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
def _bin_count(row):
    count = MIN_BINS
    while count < MAX_BINS and count * PER_BIN < row:
        count *= 2
    return count


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
    count = _bin_count(length)
    entries, bins = np.empty((3, length + 1), np.uint32), np.empty((3, count + 1), np.uint32)
    limits, counts = np.empty((2, count), np.int64), np.empty(RADIX, np.uint32)
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
                _keep_ranked(
                    part[r:e], drawn[r:e], density, epsilon, flags[r:e], entries, bins, limits, counts
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
