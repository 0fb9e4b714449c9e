"""Exact k-th magnitudes without a sort: a bracket guessed from a sample and one counting pass, else histograms.

The order of entries is (|delta|, -index): of equal magnitudes the lower index is the larger, so "the k largest"
names exactly k entries. Bits are those of |delta| as float32, which order like the magnitudes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.compiled.cast import decode
from mixmerge.kernels.compiled.combine import delta_block, deltas_chunk
from mixmerge.kernels.compiled.stored import lowest_bit
from mixmerge.kernels.layout import BLOCK, LOW_BINS, LOW_SHIFT

U8, U32, U64, I64 = np.uint8, np.uint32, np.uint64, np.int64
_ABS = U32(0x7FFFFFFF)


@njit(fastmath={"reassoc"})
def _count_above(bits, high):
    # Whole numbers up to BLOCK add exactly in float32 in any order, and float32 vectorises.
    above = np.float32(0)
    for i in range(bits.size):
        above += np.float32(1) if (bits[i] & _ABS) > high else np.float32(0)
    return I64(above)


@njit
def _flag(bits, low, span, flags):
    for i in range(bits.size):
        flags[i] = U8(((bits[i] & _ABS) - low) <= span)


@njit
def _count_flags(words):
    found = U64(0)
    for j in range(words.size):
        # The eight flags of a word add up in its top byte.
        found += (words[j] * U64(0x0101010101010101)) >> U64(56)
    return I64(found)


@njit(fastmath={"reassoc"})
def _count_crowd(bits, crowd, flags):
    found = np.float32(0)
    for i in range(bits.size):
        other = (bits[i] & _ABS) != crowd
        found += np.float32(0) if other else np.float32(1)
        flags[i] &= U8(other)
    return I64(found)


@njit
def _gather(words, values, s, bits, places):
    # Few are inside: words without a flag cost one look.
    found = U64(0)
    for j in range(words.size):
        word = words[j]
        while word:
            i = (U64(j) << U64(3)) + (lowest_bit(word) >> U64(3))
            bits[found] = values[i] & _ABS
            places[found] = U32(s) + U32(i)
            found += U64(1)
            word &= word - U64(1)
    return I64(found)


@njit
def collect_chunk(
    raw, codes, direct, n, experts, low, high, crowds, sizes, above, counted, found, room, bits, places,
    scratch, flags,
):  # fmt: skip
    """Count the magnitudes above every bracket and in its crowds, and gather the rest of what is inside.

    J brackets: of the deltas ``experts`` (J, rising), from ``low`` to ``high`` (J); the first ``sizes`` (J) of
    ``crowds`` (J, C) are magnitudes inside that are only counted. Filled in are ``above`` and ``found`` (J),
    ``counted`` (J, C), and ``bits`` and ``places`` (offsets in the chunk; J, ``room`` + B) until there is no room
    for another block; ``found`` may say more. ``scratch`` (2, B), ``flags`` (B) uint8.
    """
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        words = flags[: (m + 7) // 8 * 8].view(np.uint64)
        words[-1] = U64(0)
        decode(codes[0], raw[0], s, base)
        for j in range(experts.size):
            if j == 0 or experts[j] != experts[j - 1]:
                delta_block(raw, codes, direct, experts[j], s, base, delta)
            values, at = delta.view(np.uint32), found[j]
            above[j] += _count_above(values, high[j])
            _flag(values, low[j], high[j] - low[j], flags[:m])
            for c in range(sizes[j]):
                counted[j, c] += _count_crowd(values, crowds[j, c], flags[:m])
            if at <= room:
                found[j] += _gather(words, values, s, bits[j][at:], places[j][at:])
            else:
                found[j] += _count_flags(words)


@njit
def _count_high(bits, bins):
    for i in range(bits.size):
        bins[(bits[i] & _ABS) >> U32(LOW_SHIFT)] += 1


@njit
def _count_low(bits, prefix, bins):
    for i in range(bits.size):
        b = bits[i] & _ABS
        if b >> U32(LOW_SHIFT) == prefix:
            bins[b & U32(LOW_BINS - 1)] += 1


@njit
def histogram_chunk(raw, codes, direct, n, expert, prefix, bins, scratch):
    """Add one expert's magnitudes to ``bins`` (int64): by their high bits when ``prefix`` is negative, else
    by their low bits where the high ones equal it. ``scratch`` (2, B)."""
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        deltas_chunk(raw, codes, direct, expert, s, delta, base)
        if prefix < 0:
            _count_high(delta.view(np.uint32), bins)
        else:
            _count_low(delta.view(np.uint32), U32(prefix), bins)


@njit
def ties_chunk(raw, codes, direct, n, expert, value, wanted, scratch, result):
    """Count the magnitudes whose bits equal ``value``: (count, offset of the ``wanted``-th or -1) into ``result``."""
    count, where = 0, -1
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        deltas_chunk(raw, codes, direct, expert, s, delta, base)
        bits = delta.view(np.uint32)
        for i in range(m):
            if (bits[i] & _ABS) == U32(value):
                count += 1
                if count == wanted:
                    where = s + i
    result[0], result[1] = count, where
