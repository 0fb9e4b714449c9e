"""Which entries of a row DELLA keeps, without sorting most rows.

A row's entries are ranked by (|delta|, -index), ascending from 0; entry of rank r is kept when its draw is below
    2**32 * ((density - epsilon) + 2 * epsilon * r / (n - 1)).
Most draws are below that for every rank or for none. For the others a histogram of the row bounds the rank, and that
mostly decides. Its bins are steps of a power of two: differences of close bfloat16 numbers are whole multiples of
one, so most bins are of one magnitude, and what is still open there is ranked by its place among its equals.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.compiled.stored import WIDE, choose_16, lowest_bit, magnitude, number
from mixmerge.kernels.layout import BLOCK, RADIX

U8, U32, U64, I32, F32, F64 = np.uint8, np.uint32, np.uint64, np.int32, np.float32, np.float64
_ABS = U32(0x7FFFFFFF)
# Arrays used as indices are unsigned: numba then leaves out the test for negative ones.
# Up to FEW entries in bins of several magnitudes are ranked against the whole row; with more of them, it is sorted.
FEW = 64
_DIGIT = U32(RADIX - 1)


@njit
def _below(draws, low, keep):
    for i in range(draws.size):
        keep[i] = U8(draws[i] < low)


@njit
def _between(draws, low, span, chosen):
    """Indices of the draws from ``low`` to ``low + span``; returns how many."""
    found, whole = U64(0), draws.size // 16 * 16 if WIDE else 0
    for s in range(0, whole, 16):
        found += choose_16(draws, U64(s), low, span, chosen, found)
    for i in range(whole, draws.size):
        chosen[found] = U32(i)
        found += U64((draws[i] - low) <= span)
    return found


@njit
def _scale(bits, bins):
    """The power of two that takes the largest magnitude to the upper half of ``bins``, and how many that uses: none
    of a row of zeros, or with NaN or Inf."""
    top = magnitude(bits[0])
    for i in range(bits.size):
        size = magnitude(bits[i])
        top = size if size > top else top
    if top == U32(0) or top >= U32(0x7F800000):
        return F32(1), 0
    exponent = 253 - np.int64(top >> U32(23))
    while bins > 1:
        bins //= 2
        exponent += 1
    exponent = 254 if exponent > 254 else exponent
    factor = number(U32(exponent << 23))
    return factor, np.int64(number(U32(top)) * factor) + 1


@njit
def _keys(values, factor, keys, finer):
    """The steps in each magnitude; and flags, where they are not whole."""
    for i in range(keys.size):
        size = abs(values[i]) * factor
        step = I32(size)
        keys[i] = U32(step)
        finer[i] = U8(size != F32(step))


@njit
def _mark(words, keys, mixed):
    """The bins of flagged entries may hold several magnitudes; so may the lowest, where the smallest underflow."""
    for b in range(mixed.size):
        mixed[b] = U8(0)
    mixed[0] = U8(1)
    for j in range(words.size):
        word = words[j]
        while word:
            i = (U64(j) << U64(3)) + (lowest_bit(word) >> U64(3))
            word &= word - U64(1)
            mixed[keys[i]] = U8(1)


@njit
def _count(keys, within, counts, starts):
    """``starts[b]`` entries have a key below b; ``within[i]`` entries before entry i have its key."""
    for b in range(counts.size):
        counts[b] = U32(0)
    pairs = keys.size // 2
    keys_of, within_of = keys[: 2 * pairs].view(np.uint64), within[: 2 * pairs].view(np.uint64)
    for j in range(pairs):
        # Two at a time: stores are what this waits for.
        pair = keys_of[j]
        first, second = pair & U64(0xFFFFFFFF), pair >> U64(32)
        before = counts[first]
        counts[first] = U32(before + U32(1))
        then = counts[second]
        counts[second] = U32(then + U32(1))
        within_of[j] = U64(before) | (U64(then) << U64(32))
    for i in range(2 * pairs, keys.size):
        within[i] = counts[keys[i]]
        counts[keys[i]] += U32(1)
    total = U32(0)
    for b in range(counts.size):
        starts[b] = total
        total = U32(total + counts[b])
    starts[counts.size] = total


@njit
def _decide(chosen, draws, keys, starts, low, span, keep, limits, unsure):
    """Settle the ``chosen`` as far as the bounds of their ranks do; returns how many are left as ``unsure``."""
    left, scale = U64(0), 1.0 / span
    for j in range(chosen.size):
        # Kept is what has a rank above (draw - low) / span; one rank is more than the rounding of this.
        limits[j] = I32((F64(draws[chosen[j]]) - low) * scale)
    for j in range(chosen.size):
        i, limit = chosen[j], limits[j]
        key = U64(keys[i])
        sure = U64(I32(starts[key]) >= limit + I32(2))
        keep[i] = U8(sure)
        unsure[left] = i
        left += U64(I32(starts[key + U64(1)]) > limit) - sure  # what is sure lies above the limit, too
    return left


@njit(fastmath={"reassoc"})
def _count_below(bits, bound):
    # Whole numbers below 2**24 add exactly in float32 in any order, and float32 vectorises.
    count = F32(0)
    for i in range(bits.size):
        count += F32(1) if (bits[i] & _ABS) < bound else F32(0)
    return np.int64(count)


@njit
def _rank(bits, i):
    """Entries below entry ``i`` in the order: the smaller ones, and the equal ones after it."""
    mine, rank = bits[i] & _ABS, np.int64(0)
    for s in range(0, i, BLOCK):
        rank += _count_below(bits[s : min(s + BLOCK, i)], mine)
    for s in range(i, bits.size, BLOCK):
        rank += _count_below(bits[s : min(s + BLOCK, bits.size)], mine + U32(1))
    return rank - 1


@njit
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


@njit
def sort_row(bits, counts, order, spare):
    """Indices of a row in the order (|delta|, -index): three stable radix passes. ``counts`` (RADIX),
    ``order`` and ``spare`` (n) are uint32."""
    n = bits.size
    for j in range(n):
        spare[j] = U32(n - 1 - j)
    _radix_pass(bits, U32(0), counts, spare, order)
    _radix_pass(bits, U32(11), counts, order, spare)
    _radix_pass(bits, U32(22), counts, spare, order)


@njit
def _rank_alike(unsure, bits, draws, keys, within, starts, mixed, low, span, keep):
    """Settle the ``unsure`` in bins of one magnitude: of equal ones, the first in the row ranks highest. The others
    move to the front; returns how many. Zeros are left out: they add nothing, kept or not."""
    left = U64(0)
    for j in range(unsure.size):
        i = unsure[j]
        key = U64(keys[i])
        if mixed[key]:
            unsure[left] = i
            left += U64((bits[i] & _ABS) != U32(0))
        else:
            rank = starts[key + U64(1)] - U32(1) - within[i]
            keep[i] = U8(F64(draws[i]) < low + span * rank)
    return left


@njit
def _keep_sorted(bits, draws, low, span, keep, digits, order, spare):
    sort_row(bits, digits, order, spare)
    for r in range(order.size):
        keep[order[r]] = U8(F64(draws[order[r]]) < low + span * r)


@njit
def keep_ranked(values, draws, density, epsilon, keep, bins, scratch):
    """One row, ranked by up to ``bins`` bins, a power of two. ``scratch`` (``layout.rank_words(n)``) uint32."""
    n, bits = values.size, values.view(np.uint32)
    low, span = (density - epsilon) * 4294967296.0, 2 * epsilon * 4294967296.0 / (n - 1)
    m = n + n % 2  # what is read in words of 64 bits begins at one
    keys, within = scratch[:n], scratch[m : m + n]
    chosen, unsure = scratch[2 * m : 2 * m + n], scratch[3 * m : 3 * m + n]
    limits, c = scratch[4 * m : 4 * m + n].view(np.int32), 5 * m
    digits, c = scratch[c : c + RADIX], c + RADIX
    factor, used = _scale(bits, bins)
    if used == 0:
        for i in range(n):
            keep[i] = 0  # all zeros, which add nothing; or not finite, which the pass that writes refuses
        return
    if span < 1.0:
        _keep_sorted(bits, draws, low, span, keep, digits, unsure, within)
        return
    least = U32(np.ceil(low))
    _below(draws, least, keep)
    found = _between(draws, least, U32(min(np.ceil(low + span * (n - 1)), 4294967296.0) - 1) - least, chosen)
    counts, starts = scratch[c : c + used], scratch[c + bins : c + bins + used + 1]
    mixed, f = scratch[c + 2 * bins + 2 : c + 3 * bins].view(np.uint8)[:used], c + 3 * bins
    flags = scratch[f : f + n // 4 + 3].view(np.uint8)
    words = flags[: (n + 7) // 8 * 8].view(np.uint64)
    words[-1] = U64(0)
    _keys(values, factor, keys, flags[:n])
    _mark(words, keys, mixed)
    _count(keys, within, counts, starts)
    left = _decide(chosen[:found], draws, keys, starts, low, span, keep, limits, unsure)
    left = _rank_alike(unsure[:left], bits, draws, keys, within, starts, mixed, low, span, keep)
    if left > FEW:
        _keep_sorted(bits, draws, low, span, keep, digits, unsure, within)
        return
    for j in range(np.int64(left)):
        i = np.int64(unsure[j])
        keep[i] = U8(F64(draws[i]) < low + span * _rank(bits, i))
