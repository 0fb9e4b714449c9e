"""The largest similarities of each query, and sums of their rows; ``mixmerge.kernels.nearest`` says what they are.

Shapes: Q queries, n of them in a call, m rows in a call, C places a query has, k neighbours, N rows, E columns.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.layout import NEAREST_BLOCK, NEAREST_LOW, NEAREST_ONE

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
def keep_largest(similar, first, queries, keys, counts, least, k):  # (n, m), (n,), (Q, C), (Q,), (Q,)
    """Take in the similarities of queries to the m rows from ``first`` on.

    ``keys`` of a query has its ``counts`` best so far and some more; what is below ``least`` is none of the k best.
    When all places are taken, the k best stay.
    """
    for i in range(queries.size):
        q, row = queries[i], similar[i]
        mine, count, bound = keys[q], counts[q], least[q]
        low = np.float32(bound >> 32) / np.float32(NEAREST_ONE)
        for start in range(0, row.size, NEAREST_BLOCK):  # most blocks have none: that is seen 16 at a time
            block = row[start : start + NEAREST_BLOCK]
            if _count_from(block, low) == 0:
                continue
            for j in range(block.size):
                if block[j] < low:
                    continue
                key = (I64(block[j] * np.float32(NEAREST_ONE)) << 32) | (
                    I64(NEAREST_LOW) - (first + start + j)
                )
                if key > bound:
                    mine[count] = key
                    count += 1
                    if count == mine.size:
                        bound = _largest(mine, k)
                        count = k
                        low = np.float32(bound >> 32) / np.float32(NEAREST_ONE)
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
