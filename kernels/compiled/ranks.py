"""Which entries of a row DELLA keeps, without ranking them; and ranks, by a sort, where they are asked for.

Entries are ordered by (|delta|, -index). The entry of ascending rank r among n is kept with chance
    (density - epsilon) + 2 * epsilon * r / (n - 1).
A draw below ``density - epsilon`` keeps it and one above ``density + epsilon`` drops it, whatever its rank. Any other
picks a rival evenly among the n - 1 other entries, and the entry is kept if it comes after that: as r of them come
before it, with chance r / (n - 1). The plain definition is ``methods.sparsify.sampled_by_rank``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.compiled.stored import WIDE, choose_16
from mixmerge.kernels.layout import RADIX

U8, U32, U64, F64 = np.uint8, np.uint32, np.uint64, np.float64
_ABS, _DIGIT = U32(0x7FFFFFFF), U32(RADIX - 1)
# Arrays used as indices are unsigned: numba then leaves out the test for negative ones.


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
def _meet(chosen, draws, bits, low, share, won):
    """Whether each of the ``chosen`` comes after its rival."""
    for j in range(chosen.size):
        i = chosen[j]
        rival = U32(F64(U32(draws[i] - low)) * share)
        rival = U32(rival + U32(rival >= i))
        # An equal one comes before it if it lies behind it in the row.
        won[j] = U32((bits[rival] & _ABS) < U32((bits[i] & _ABS) + U32(rival > i)))


@njit
def keep_ranked(values, draws, density, epsilon, keep, scratch):
    """One row of at least 2 entries. ``scratch`` (``layout.rank_words(n)``) uint32."""
    n = values.size
    low = np.int64(np.ceil((density - epsilon) * 4294967296.0))
    high = np.int64(min(np.ceil((density + epsilon) * 4294967296.0), 4294967296.0))
    if low >= 4294967296:
        keep[:] = U8(1)
        return
    _below(draws, U32(low), keep)
    if low >= high:
        return
    chosen, won = scratch[:n], scratch[n : 2 * n]
    found = _between(draws, U32(low), U32(high - 1 - low), chosen)
    chosen = chosen[:found]
    _meet(chosen, draws, values.view(np.uint32), U32(low), F64(n - 1) / F64(high - low), won)
    for j in range(chosen.size):
        keep[chosen[j]] = U8(won[j])


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
