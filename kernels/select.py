"""Exact k-th magnitudes without a sort: a bracket guessed from a sample and one counting pass, else histograms.

The order of entries is (|delta|, -index): of equal magnitudes the lower index is the larger, so "the k largest"
names exactly k entries. Bits are those of |delta| as float32, which order like the magnitudes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, delta_block

U32, I64 = np.uint32, np.int64
_ABS = U32(0x7FFFFFFF)

# A magnitude's 31 bits are counted in two steps: the high 16, then the low 15 under one high value.
LOOK = 16  # entries per group of ``_between``
HIGH_BINS, LOW_BINS, LOW_SHIFT = 1 << 16, 1 << 15, 15


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _count_above(bits, high):
    # Whole numbers up to BLOCK add exactly in float32 in any order, and float32 vectorises.
    above = np.float32(0)
    for i in range(bits.size):
        above += np.float32(1) if (bits[i] & _ABS) > high else np.float32(0)
    return I64(above)


@njit(nogil=True, cache=True)
def _between(bits, low, high, places):
    # Few are inside: whole groups of lanes are looked at first, and only those with a hit one by one.
    found, span = np.uint64(0), high - low
    whole = bits.size // LOOK * LOOK
    for s in range(0, whole, LOOK):
        part = bits[s : s + LOOK]
        hits = U32(0)
        for i in range(LOOK):
            hits |= U32(((part[i] & _ABS) - low) <= span)
        if hits:
            for i in range(LOOK):
                places[found] = U32(s + i)
                found += np.uint64(((part[i] & _ABS) - low) <= span)
    for i in range(whole, bits.size):
        places[found] = U32(i)
        found += np.uint64(((bits[i] & _ABS) - low) <= span)
    return I64(found)


@njit(nogil=True, cache=True)
def collect_chunk(
    raw, codes, direct, n, experts, low, high, above, found, room, bits, places, scratch, spare
):
    """Count the magnitudes above every bracket, and gather what is inside, with their offsets in the chunk.

    J brackets: of the deltas ``experts`` (J, rising), from ``low`` to ``high`` (J). Filled in are ``above`` and
    ``found`` (J), and of ``bits`` and ``places`` (J, n or more) the first ``room`` at most; ``found`` may say more.
    ``scratch`` (2, B), ``spare`` (B + 1) uint32.
    """
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        decode(codes[0], raw[0], s, base)
        for j in range(experts.size):
            if j == 0 or experts[j] != experts[j - 1]:
                delta_block(raw, codes, direct, experts[j], s, base, delta)
            values = delta.view(np.uint32)
            above[j] += _count_above(values, high[j])
            more, at = _between(values, low[j], high[j], spare), found[j]
            if at + more <= room:
                _gather(values, spare[:more], s, bits[j][at : at + more], places[j][at : at + more])
            found[j] += more


@njit(nogil=True, cache=True)
def _gather(values, spare, s, bits, places):
    for i in range(spare.size):
        bits[i] = values[spare[i]] & _ABS
        places[i] = U32(s) + spare[i]


@njit(nogil=True, cache=True)
def _count_high(bits, bins):
    for i in range(bits.size):
        bins[(bits[i] & _ABS) >> U32(LOW_SHIFT)] += 1


@njit(nogil=True, cache=True)
def _count_low(bits, prefix, bins):
    for i in range(bits.size):
        b = bits[i] & _ABS
        if b >> U32(LOW_SHIFT) == prefix:
            bins[b & U32(LOW_BINS - 1)] += 1


@njit(nogil=True, cache=True)
def histogram_chunk(raw, codes, direct, n, expert, prefix, bins, scratch):
    """Add one expert's magnitudes to ``bins`` (int64): by their high bits when ``prefix`` is negative, else
    by their low bits where the high ones equal it. ``scratch`` (2, B)."""
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        if not direct[expert]:
            decode(codes[0], raw[0], s, base)
        delta_block(raw, codes, direct, expert, s, base, delta)
        if prefix < 0:
            _count_high(delta.view(np.uint32), bins)
        else:
            _count_low(delta.view(np.uint32), U32(prefix), bins)


@njit(nogil=True, cache=True)
def ties_chunk(raw, codes, direct, n, expert, value, wanted, scratch):
    """Count the magnitudes whose bits equal ``value``; returns (count, offset of the ``wanted``-th or -1)."""
    count, where = 0, -1
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        if not direct[expert]:
            decode(codes[0], raw[0], s, base)
        delta_block(raw, codes, direct, expert, s, base, delta)
        bits = delta.view(np.uint32)
        for i in range(m):
            if (bits[i] & _ABS) == U32(value):
                count += 1
                if count == wanted:
                    where = s + i
    return count, where


def locate(bins: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest of a histogram, and how many are in the bins above it."""
    from_top = np.cumsum(bins[::-1])
    position = int(np.searchsorted(from_top, k))
    return len(bins) - 1 - position, int(from_top[position - 1]) if position else 0
