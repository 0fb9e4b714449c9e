"""The largest similarities of each query, and sums of their rows; ``mixmerge.kernels.nearest`` says what they are.

Shapes: Q queries, n of them in a call, m rows in a call, C places a query has, k neighbours, N rows, E columns.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.layout import NEAREST_LOW, NEAREST_ONE

I64 = np.int64


@njit
def _largest(keys, k):
    """Move the k largest to the front, and return the least of these. Keys differ, and there are more than k."""
    low, high = 0, keys.size - 1
    while low < high:
        pivot, i, j = keys[(low + high) // 2], low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    least = keys[0]
    for i in range(1, k):
        least = min(least, keys[i])
    return least


@njit(fastmath={"reassoc"})
def _count_from(values, low):
    # Whole numbers add exactly in float32 in any order, and float32 vectorises.
    count = np.float32(0)
    for i in range(values.size):
        count += np.float32(1) if values[i] >= low else np.float32(0)
    return count


@njit
def _key(similar, place):
    return (I64(similar * np.float32(NEAREST_ONE)) << 32) | (I64(NEAREST_LOW) - place)


@njit
def _similarity(key):
    return np.float32(key >> 32) / np.float32(NEAREST_ONE)


@njit
def _kept(mine, count, bound, key, k):
    """Put a key at the end of the ``count`` there are; of a full row the k best stay. How many there are, the bound."""
    mine[count] = key
    if count + 1 < mine.size:
        return count + 1, bound
    return k, _largest(mine, k)


@njit
def keep_largest(similar, first, queries, keys, counts, least, k):  # (n, m), (n,), (Q, C), (Q,), (Q,)
    """Take in the similarities of queries to the m rows from ``first`` on.

    ``keys`` of a query has its ``counts`` best so far and some more; what is below ``least`` is none of the k best.
    When all places are taken, the k best stay.
    """
    for i in range(queries.size):
        q, row = queries[i], similar[i]
        mine, count, bound = keys[q], counts[q], least[q]
        low = _similarity(bound)
        if _count_from(row, low) == 0:  # so it is in most lists, and is seen 16 rows at a time
            continue
        for j in range(row.size):
            if row[j] < low:
                continue
            key = _key(row[j], first + j)
            if key > bound:
                count, bound = _kept(mine, count, bound, key, k)
                low = _similarity(bound)
        counts[q], least[q] = count, bound


@njit(fastmath={"reassoc"})
def _count_hopeful(heads, tails, tail, low):
    count = np.float32(0)
    for i in range(heads.size):
        count += np.float32(1) if heads[i] + tail * tails[i] >= low else np.float32(0)
    return count


@njit(fastmath={"reassoc", "contract"})
def _product(one, other):
    # Multiples of the grid's step: every partial sum is exact, in any order.
    total = np.float32(0)
    for i in range(one.size):
        total += one[i] * other[i]
    return total


@njit
def screen_largest(
    near, tails, first, queries, tail, asked, stored, keys, counts, least, k
):  # (n, m), (N,), (n,), (Q,), (Q, D), (N, D), (Q, C), (Q,), (Q,)
    """As ``keep_largest``, of rows whose heads alone are multiplied; hopeful ones are looked at in full.

    ``near`` are products of heads; a row is hopeful if that and ``tail`` of the query times its own reach the bound.
    """
    behind = tails[first : first + near.shape[1]]
    for i in range(queries.size):
        q, row = queries[i], near[i]
        mine, count, bound, rest = keys[q], counts[q], least[q], tail[q]
        low = _similarity(bound)
        if _count_hopeful(row, behind, rest, low) == 0:
            continue
        for j in range(row.size):
            if row[j] + rest * behind[j] < low:
                continue
            key = _key(_product(asked[q], stored[first + j]), first + j)
            if key > bound:
                count, bound = _kept(mine, count, bound, key, k)
                low = _similarity(bound)
        counts[q], least[q] = count, bound


@njit
def weighted_sums(rows, weight, values, sums):  # (n, k), (n, k), (N, E), (n, E)
    """``sums[i]`` = the sum over j of ``weight[i, j] * values[rows[i, j]]``; a row of weight 0 is not read."""
    for i in range(rows.shape[0]):
        total = sums[i]
        total[:] = 0
        for j in range(rows.shape[1]):
            w = weight[i, j]
            if w != 0:
                row = values[rows[i, j]]
                for e in range(total.size):
                    total[e] += w * row[e]
