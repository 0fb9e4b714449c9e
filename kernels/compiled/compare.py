"""How experts differ, in one pass over a chunk: norms and products of their deltas, zeros, signs that disagree.

n elements of the chunk, E experts, row 0 of the inputs is the base, B block length. Sums are float64, kept in
lanes and added in one fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.compiled.cast import decode
from mixmerge.kernels.compiled.combine import _add_products, _sum_lanes, delta_block
from mixmerge.kernels.layout import COMPARE_BLOCK as BLOCK

U8, U64, I32, I64, F32 = np.uint8, np.uint64, np.int32, np.int64, np.float32

_ONES = U64(0x0101010101010101)
_BYTES = U64(0x00FF00FF00FF00FF)


@njit
def _mark(delta, marks):
    """Bit 0 of a byte: the entry is positive; bit 1: it is negative."""
    zero = F32(0)
    for i in range(delta.size):
        # In 32 bits throughout: shifts of bytes become 64-bit, and are not vectorised.
        marks[i] = U8(I32(delta[i] > zero) | (I32(delta[i] < zero) << I32(1)))
    for i in range(delta.size, marks.size):
        marks[i] = U8(0)


@njit
def _total(counts):
    """The sum of the eight bytes of a word."""
    pairs = (counts & _BYTES) + ((counts >> U64(8)) & _BYTES)
    return I64((pairs * U64(0x0001000100010001)) >> U64(48))


@njit
def _count_moved(marks):
    counts = U64(0)
    for i in range(marks.size):
        counts += (marks[i] | (marks[i] >> U64(1))) & _ONES
    return _total(counts)


@njit
def _count_opposite(a, b):
    counts = U64(0)
    for i in range(a.size):
        counts += ((a[i] & (b[i] >> U64(1))) | ((a[i] >> U64(1)) & b[i])) & _ONES
    return _total(counts)


@njit
def _count_both(marks):
    counts = U64(0)
    for i in range(marks.size):
        counts += marks[i] & (marks[i] >> U64(1)) & _ONES
    return _total(counts)


@njit
def _join(every, marks):
    for i in range(every.size):
        every[i] |= marks[i]


@njit
def compare_chunk(raw, codes, direct, n, values, marks, lanes, products, counts, totals, seen):
    """Add up one chunk.

    ``raw`` (E + 1, bytes) as stored, ``codes`` (E + 1) their dtypes, ``direct`` (E + 1) rows that already hold
    deltas; scratch: ``values`` (E + 1, B), ``marks`` (E + 1, B) uint8, ``lanes`` (E * E + 1, LANES) float64.
    Written: ``totals`` (2), the base's sum of squares and how many entries have both signs among the experts; the
    upper triangles of ``products`` (E, E), <delta i, delta j>, and of ``counts`` (E, E), entries of opposite sign
    and on the diagonal entries that are zero; ``seen`` (E + 1), the largest magnitude's bits of every input.
    """
    experts = codes.size - 1
    squares = lanes[experts * experts]
    lanes[:] = 0
    counts[:] = 0
    conflicts = 0
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        whole = (m + 7) // 8 * 8
        base = values[0][:m]
        seen[0] = max(seen[0], decode(codes[0], raw[0], s, base))
        _add_products(base, base, squares)
        every = marks[0][:whole].view(np.uint64)
        every[:] = U64(0)
        for i in range(experts):
            delta = values[i + 1][:m]
            top = delta_block(raw, codes, direct, i + 1, s, base, delta)
            seen[i + 1] = max(seen[i + 1], top)
            _mark(delta, marks[i + 1][:whole])
            mine = marks[i + 1][:whole].view(np.uint64)
            counts[i, i] += m - _count_moved(mine)
            _join(every, mine)
            for j in range(i + 1):
                _add_products(values[j + 1][:m], delta, lanes[j * experts + i])
                if j < i:
                    counts[j, i] += _count_opposite(marks[j + 1][:whole].view(np.uint64), mine)
        conflicts += _count_both(every)
    for i in range(experts):
        for j in range(i, experts):
            products[i, j] = _sum_lanes(lanes[i * experts + j])
    totals[0], totals[1] = _sum_lanes(squares), conflicts
