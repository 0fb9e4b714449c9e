"""DELLA's keep-probabilities from ranks within rows, without sorting most rows.

A row's entries are ranked by (|delta|, -index), ascending from 0; entry of rank r is kept when its draw is below
    2**32 * ((density - epsilon) + 2 * epsilon * r / (n - 1)).
Whether a draw decides depends on the exact rank only when the thresholds of the lowest and the highest rank an
entry can have, given a histogram of the row, lie on both sides of it. Those few are ranked by counting; a row
with many of them (few distinct magnitudes) is put in order by its bins, or sorted.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, LANES, _add_magnitudes, _sum_lanes, delta_block
from mixmerge.kernels.random import draw_block

U8, U32, F32, F64 = np.uint8, np.uint32, np.float32, np.float64
_ABS = U32(0x7FFFFFFF)
# Bins of a row's histogram: about as many as it has entries, within the first-level cache.
MIN_BINS, MAX_BINS = 256, 4096
# Up to this many entries of a row are ranked by counting, one by one; more are cheaper to put in order.
MANY = 48


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
def _keep_random(draws, limit, keep):
    for i in range(draws.size):
        keep[i] = U8(F64(draws[i]) < limit)


@njit(nogil=True, cache=True)
def _bin_rows(bits, values, bins, keys):
    """A monotone map of |delta| to ``bins`` bins, linear in the value; returns False for a row of zeros."""
    top = U32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & _ABS)
    if top == U32(0):
        return False
    largest = _as_float(top)
    factor, last = F32(bins) / largest, np.int32(bins - 1)
    if not np.isfinite(factor):
        factor = F32(0)  # a row of subnormals: one bin, and the sort decides
    for i in range(keys.size):
        keys[i] = min(np.int32(abs(values[i]) * factor), last)
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
def _undecided(draws, always, never, keep, places):
    """Decide what any rank decides; the others' places."""
    for i in range(draws.size):
        keep[i] = U8(F64(draws[i]) < always)
    count = 0
    for i in range(draws.size):
        u = F64(draws[i])
        places[count] = i
        count += np.int64((u >= always) & (u < never))
    return count


@njit(nogil=True, cache=True)
def _rank(bits, i):
    mine = bits[i] & _ABS
    smaller, later = np.int32(0), np.int32(0)
    for j in range(bits.size):
        smaller += np.int32((bits[j] & _ABS) < mine)
    rest = bits[i + 1 :]
    for j in range(rest.size):
        later += np.int32((rest[j] & _ABS) == mine)
    return smaller + later


@njit(nogil=True, cache=True)
def ranks_by_sorting(bits):
    """Rank of every entry of a row in the order (|delta|, -index)."""
    n = bits.size
    keys = np.empty(n, np.int64)
    for i in range(n):
        keys[i] = (np.int64(bits[i] & _ABS) << np.int64(32)) | np.int64(n - 1 - i)
    order = np.argsort(keys)
    ranks = np.empty(n, np.int64)
    for r in range(n):
        ranks[order[r]] = r
    return ranks


@njit(nogil=True, cache=True)
def _order_by_bins(bits, keys, starts, order):
    """Entries in ascending order: counting sort by bin, then insertion. False when that would take too long."""
    n = bits.size
    for i in range(n - 1, -1, -1):
        key = keys[i]
        order[starts[key]] = i
        starts[key] += 1
    budget = 16 * n
    for r in range(1, n):
        i = order[r]
        mine, at = bits[i] & _ABS, r
        while at > 0 and (bits[order[at - 1]] & _ABS) > mine:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i
        budget -= r - at
        if budget < 0:
            return False
    return True


@njit(nogil=True, cache=True)
def _keep_ranked(values, draws, density, epsilon, keep, keys, even, odd, starts, places, open_):
    n, bits = values.size, values.view(np.uint32)
    low, span = (density - epsilon) * 4294967296.0, 2 * epsilon * 4294967296.0 / (n - 1)
    if not _bin_rows(bits, values, even.size, keys):
        for i in range(n):
            keep[i] = 0  # zeros add nothing, kept or not
        return
    _count(keys, even, odd, starts)
    asked = _undecided(draws, low, low + span * (n - 1), keep, places)
    unsure = 0
    for j in range(asked):
        i = places[j]
        u, b = F64(draws[i]), keys[i]
        sure = u < low + span * starts[b]
        keep[i] = U8(sure)
        open_[unsure] = i
        # Zeros add nothing, so which of them are kept need not be known.
        zero = (bits[i] & _ABS) == U32(0)
        unsure += np.int64((not sure) & (not zero) & (u < low + span * (starts[b + 1] - 1)))
    if unsure <= MANY:
        for j in range(unsure):
            i = open_[j]
            keep[i] = U8(F64(draws[i]) < low + span * _rank(bits, i))
    elif _order_by_bins(bits, keys, starts, places):
        for r in range(n):
            i = places[r]
            keep[i] = U8(F64(draws[i]) < low + span * r)
    else:
        ranks = ranks_by_sorting(bits)
        for i in range(n):
            keep[i] = U8(F64(draws[i]) < low + span * ranks[i])


@njit(nogil=True, cache=True)
def _pack_aligned(keep, mask):
    for j in range(mask.size):
        part = keep[8 * j : 8 * j + 8]
        byte = U8(0)
        for i in range(part.size):
            byte |= U8(part[i] << U8(i))
        mask[j] = byte


@njit(nogil=True, cache=True)
def _mask_rows(delta, draws, row, density, epsilon, keep):
    bins = MIN_BINS
    while bins < min(row, MAX_BINS):
        bins *= 2
    keys, even, odd = np.empty(row, np.int32), np.empty(bins, np.int32), np.empty(bins, np.int32)
    starts = np.empty(bins + 1, np.int32)
    places, open_ = np.empty(row + 1, np.int32), np.empty(row + 1, np.int32)
    for s in range(0, delta.size, row):
        e = s + row
        if row == 1 or epsilon == 0.0:
            _keep_random(draws[s:e], density * 4294967296.0, keep[s:e])
        else:
            _keep_ranked(
                delta[s:e], draws[s:e], density, epsilon, keep[s:e], keys, even, odd, starts, places, open_
            )


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
        _keep_random(draws, density * 4294967296.0, keep)
    else:
        _mask_rows(delta, draws, row, density, epsilon, keep)
    _pack_aligned(keep, mask[: (n + 7) // 8])
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
            delta[i] = delta[i] * F32(1 / density) if F64(draws[i]) < density * 4294967296.0 else F32(0)
        return
    low, span = density - epsilon, 2 * epsilon / (row - 1)
    for s in range(0, n, row):
        part = delta[s : s + row]
        ranks = ranks_by_sorting(part.view(np.uint32))
        for i in range(row):
            p = low + span * ranks[i]
            part[i] = part[i] * F32(1 / p) if F64(draws[s + i]) < p * 4294967296.0 else F32(0)
