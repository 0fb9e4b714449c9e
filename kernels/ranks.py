"""Which entries of a row DELLA keeps, without sorting most rows.

A row's entries are ranked by (|delta|, -index), ascending from 0; entry of rank r is kept when its draw is below
    2**32 * ((density - epsilon) + 2 * epsilon * r / (n - 1)).
Whether a draw decides depends on the exact rank only when the thresholds of the lowest and the highest rank an
entry can have, given a histogram of the row, lie on both sides of it. Those few are ranked by counting: in a bin of
equal magnitudes, as bfloat16 deltas often are, by their places alone.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.combine import BLOCK
from mixmerge.kernels.stored import lowest_bit, number

U8, U32, U64, F32, F64 = np.uint8, np.uint32, np.uint64, np.float32, np.float64
_ABS = U32(0x7FFFFFFF)
# Arrays used as indices are unsigned: numba then leaves out the test for negative ones.
# Bins of a row's histogram. Finer ones cost more to clear and to sum than they save; with coarser ones few bins
# are of one magnitude.
MIN_BINS, MAX_BINS, PER_BIN = 256, 1024, 8
# Up to FEW entries of a row are ranked against the whole row, more against their own bins; with more than MOST
# comparisons an entry of the row on average, the row is sorted.
FEW, MOST = 16, 128
RADIX = 1 << 11
_DIGIT = U32(RADIX - 1)
UNKNOWN, SAME, MIXED = U32(0), U32(1), U32(2)


@njit(nogil=True, cache=True)
def bin_count(row):
    """Bins for a row of that many entries."""
    count = MIN_BINS
    while count < MAX_BINS and count * PER_BIN < row:
        count *= 2
    return count


@njit(nogil=True, cache=True)
def _bin_rows(bits, values, bins, keys):
    """A monotone map of |delta| to ``bins`` bins, linear in the value. Returns False for a row of zeros, and for
    one with NaN or Inf, which the pass that writes refuses."""
    top = U32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & _ABS)
    if top == U32(0) or top >= U32(0x7F800000):
        return False
    largest = number(U32(top))
    factor, last = F32(bins) / largest, np.int32(bins - 1)
    if not np.isfinite(factor):
        factor = F32(0)  # a row of subnormals: one bin, and the sort decides
    for i in range(keys.size):
        keys[i] = U32(min(np.int32(abs(values[i]) * factor), last))
    return True


@njit(nogil=True, cache=True)
def _count(keys, within, counts, starts):
    """``starts[b]`` entries have a key below b; entry i comes after ``within[i]`` of its key in its quarter of the
    row, and ``counts`` (4, B) says how many every quarter has. The quarters go side by side: an increment has
    not to wait for the one before it."""
    first, second, third, fourth = counts[0], counts[1], counts[2], counts[3]
    for b in range(first.size):
        first[b] = second[b] = third[b] = fourth[b] = U32(0)
    quarter = keys.size // 4
    second_keys, third_keys, fourth_keys = keys[quarter:], keys[2 * quarter :], keys[3 * quarter :]
    to_second, to_third, to_fourth = within[quarter:], within[2 * quarter :], within[3 * quarter :]
    for i in range(quarter):
        a, b, c, d = keys[i], second_keys[i], third_keys[i], fourth_keys[i]
        of_a, of_b, of_c, of_d = first[a], second[b], third[c], fourth[d]
        within[i], to_second[i], to_third[i], to_fourth[i] = of_a, of_b, of_c, of_d
        first[a] = U32(of_a + U32(1))
        second[b] = U32(of_b + U32(1))
        third[c] = U32(of_c + U32(1))
        fourth[d] = U32(of_d + U32(1))
    for i in range(quarter, fourth_keys.size):
        d = fourth_keys[i]
        to_fourth[i] = fourth[d]
        fourth[d] += U32(1)
    total = U32(0)
    for b in range(first.size):
        starts[b] = total
        total += U32(U32(first[b] + second[b]) + U32(third[b] + fourth[b]))
    starts[first.size] = total


@njit(nogil=True, cache=True)
def _bounds(starts, low, span, table):
    """For each bin, in one word: draws below the lower half keep an entry whatever its rank there; as many more as
    the upper half says depend on it."""
    for b in range(table.size):
        least = np.int64(np.ceil(low + span * starts[b]))
        if least > np.int64(0xFFFFFFFF):
            least = np.int64(0xFFFFFFFF)
        most = np.int64(np.ceil(low + span * (starts[b + 1] - 1)))
        table[b] = U64(least) | (U64(most - least) << U64(32) if most > least else U64(0))


@njit(nogil=True, cache=True)
def _decide(draws, keys, table, keep, open_):
    for i in range(draws.size):
        bounds, draw = table[keys[i]], draws[i]
        least = U32(bounds)
        keep[i] = U8(draw < least)
        open_[i] = U8((draw - least) < U32(bounds >> U64(32)))


@njit(nogil=True, cache=True)
def _opened(words, bits, keys, starts, unsure):
    """The entries whose flags are set, and how many are in their bins, all added up. Zeros are left out: they add
    nothing, so which of them are kept need not be known."""
    left, work = U64(0), U64(0)
    for j in range(words.size):
        word = words[j]
        while word:
            i = (U64(j) << U64(3)) + (lowest_bit(word) >> U64(3))
            word &= word - U64(1)
            unsure[left] = U32(i)
            if bits[i] & _ABS:
                left += U64(1)
                work += U64(starts[keys[i] + U32(1)] - starts[keys[i]])
    return left, work


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
def _group(bits, keys, within, counts, starts, grouped):
    """Magnitudes by bin, in rising index within each: those of bin b are ``grouped[starts[b]:starts[b + 1]]``.
    ``within`` becomes the place of every entry."""
    quarter = keys.size // 4
    for b in range(counts.shape[1]):
        place = starts[b]
        for q in range(4):
            here = counts[q, b]
            counts[q, b] = place
            place += here
    for q in range(4):
        first, last = q * quarter, keys.size if q == 3 else (q + 1) * quarter
        places = counts[q]
        for i in range(first, last):
            place = places[keys[i]] + within[i]
            within[i] = place
            grouped[place] = bits[i] & _ABS


@njit(nogil=True, cache=True)
def _same(grouped, first, last):
    """SAME if the entries of a bin are equal: then their indices alone rank them."""
    different, value = U32(0), grouped[first]
    for j in range(first, last):
        different |= grouped[j] ^ value
    return MIXED if different else SAME


@njit(nogil=True, cache=True)
def _rank_among(grouped, first, last, place):
    """Entries of a bin that are below the one at ``place``: the smaller ones, and the equal ones after it."""
    mine, rank = grouped[place], U64(0)
    for j in range(first, place):
        rank += U64(grouped[j] < mine)
    for j in range(place + U32(1), last):
        rank += U64(grouped[j] <= mine)
    return rank


@njit(nogil=True, cache=True)
def keep_ranked(values, draws, density, epsilon, keep, entries, flags, starts, counts, table, digits):
    """One row. Scratch for n entries and B bins: ``entries`` (4, n) uint32, ``flags`` (n + 8) uint8, ``starts``
    (B + 1) and ``counts`` (4, B) uint32, ``table`` (B) uint64, ``digits`` (RADIX) uint32 for the sort."""
    n, bits = values.size, values.view(np.uint32)
    keys, within, grouped, unsure = entries[0], entries[1], entries[2], entries[3]
    low, span = (density - epsilon) * 4294967296.0, 2 * epsilon * 4294967296.0 / (n - 1)
    if not _bin_rows(bits, values, table.size, keys):
        for i in range(n):
            keep[i] = 0  # zeros add nothing, kept or not
        return
    left, work = U64(FEW + 1), U64(MOST * n + 1)
    if span * (n - 1) < 4294967295.0:  # what depends on a rank fits the table's half words
        _count(keys, within, counts, starts)
        _bounds(starts, low, span, table)
        words = flags[: (n + 7) // 8 * 8].view(np.uint64)
        words[-1] = U64(0)
        _decide(draws, keys, table, keep, flags[:n])
        left, work = _opened(words, bits, keys, starts, unsure)
    if left <= FEW:
        for j in range(np.int64(left)):
            i = np.int64(unsure[j])
            keep[i] = U8(F64(draws[i]) < low + span * _rank(bits, i))
    elif work <= U64(MOST * n):
        _group(bits, keys, within, counts, starts, grouped)
        known = counts[0]
        for b in range(known.size):
            known[b] = UNKNOWN
        for j in range(np.int64(left)):
            i = unsure[j]
            b, place = keys[i], within[i]
            first, last = starts[b], starts[b + U32(1)]
            if known[b] == UNKNOWN:
                known[b] = _same(grouped, first, last)
            if known[b] == SAME:
                rank = U64(first) + U64(last) - U64(1) - U64(place)
            else:
                rank = U64(first) + _rank_among(grouped, first, last, place)
            keep[i] = U8(F64(draws[i]) < low + span * rank)
    else:
        order = unsure
        sort_row(bits, digits, order, within)
        for r in range(n):
            keep[order[r]] = U8(F64(draws[order[r]]) < low + span * r)
