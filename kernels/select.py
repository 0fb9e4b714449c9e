"""Exact k-th magnitudes without a sort: a bracket guessed from a sample and one counting pass, else histograms.

The order of entries is (|delta|, -index): of equal magnitudes the lower index is the larger, so "the k largest"
names exactly k entries. Bits are those of |delta| as float32, which order like the magnitudes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.cast import decode
from mixmerge.kernels.combine import BLOCK, delta_block
from mixmerge.kernels.stored import lowest_bit

U8, U32, U64, I64 = np.uint8, np.uint32, np.uint64, np.int64
_ABS = U32(0x7FFFFFFF)

# A magnitude's 31 bits are counted in two steps: the high 16, then the low 15 under one high value.
HIGH_BINS, LOW_BINS, LOW_SHIFT = 1 << 16, 1 << 15, 15


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _count_above(bits, high):
    # Whole numbers up to BLOCK add exactly in float32 in any order, and float32 vectorises.
    above = np.float32(0)
    for i in range(bits.size):
        above += np.float32(1) if (bits[i] & _ABS) > high else np.float32(0)
    return I64(above)


@njit(nogil=True, cache=True)
def _flag(bits, low, span, flags):
    for i in range(bits.size):
        flags[i] = U8(((bits[i] & _ABS) - low) <= span)


@njit(nogil=True, cache=True)
def _count_flags(words):
    found = U64(0)
    for j in range(words.size):
        # The eight flags of a word add up in its top byte.
        found += (words[j] * U64(0x0101010101010101)) >> U64(56)
    return I64(found)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _count_crowd(bits, crowd, flags):
    found = np.float32(0)
    for i in range(bits.size):
        other = (bits[i] & _ABS) != crowd
        found += np.float32(0) if other else np.float32(1)
        flags[i] &= U8(other)
    return I64(found)


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def count_steps(bits, low, shift, bins):
    """Add magnitudes to ``bins`` (int64) by (bits - low) >> shift."""
    for i in range(bits.size):
        bins[(bits[i] - low) >> shift] += 1


@njit(nogil=True, cache=True)
def gather_step(bits, places, low, shift, step, to_bits, to_places):
    """Copy the entries of one bin of ``count_steps``; returns how many."""
    found = 0
    for i in range(bits.size):
        if (bits[i] - low) >> shift == step:
            to_bits[found] = bits[i]
            to_places[found] = places[i]
            found += 1
    return found


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
