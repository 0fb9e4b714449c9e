"""Rows of a low-rank product, summed in one fixed order, and the norms of rows; ``mixmerge.kernels.lowrank`` says how.

Shapes: n rows, C columns, K rank.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.layout import TILE


@njit
def product(left, right, out, spare):  # (n, K), (K, C) -> (n, C)
    """``out`` = left @ right. ``spare`` (3, TILE) takes what rows past the last one would get."""
    rows, rank = left.shape
    columns = right.shape[1]
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for i0 in range(0, rows, 4):
            i1, i2, i3 = min(i0 + 1, rows - 1), min(i0 + 2, rows - 1), min(i0 + 3, rows - 1)
            # 1-D slices: LLVM sees that these are contiguous and vectorises the loop below; not so out[i, j].
            o0 = out[i0, c0:c1]
            o1 = out[i1, c0:c1] if i1 > i0 else spare[0, : c1 - c0]
            o2 = out[i2, c0:c1] if i2 > i1 else spare[1, : c1 - c0]
            o3 = out[i3, c0:c1] if i3 > i2 else spare[2, : c1 - c0]
            o0[:] = 0
            o1[:] = 0
            o2[:] = 0
            o3[:] = 0
            for k in range(0, rank, 4):
                b00, b01, b02, b03 = left[i0, k], left[i0, k + 1], left[i0, k + 2], left[i0, k + 3]
                b10, b11, b12, b13 = left[i1, k], left[i1, k + 1], left[i1, k + 2], left[i1, k + 3]
                b20, b21, b22, b23 = left[i2, k], left[i2, k + 1], left[i2, k + 2], left[i2, k + 3]
                b30, b31, b32, b33 = left[i3, k], left[i3, k + 1], left[i3, k + 2], left[i3, k + 3]
                a0, a1 = right[k, c0:c1], right[k + 1, c0:c1]
                a2, a3 = right[k + 2, c0:c1], right[k + 3, c0:c1]
                for j in range(o0.size):
                    x0, x1, x2, x3 = a0[j], a1[j], a2[j], a3[j]
                    o0[j] = (((o0[j] + b00 * x0) + b01 * x1) + b02 * x2) + b03 * x3
                    o1[j] = (((o1[j] + b10 * x0) + b11 * x1) + b12 * x2) + b13 * x3
                    o2[j] = (((o2[j] + b20 * x0) + b21 * x1) + b22 * x2) + b23 * x3
                    o3[j] = (((o3[j] + b30 * x0) + b31 * x1) + b32 * x2) + b33 * x3


@njit
def row_norms(values, lanes, norms):  # (n, C) -> (n,)
    """Euclidean norms of rows, summed in the eight float64 ``lanes``."""
    for i in range(norms.size):
        row = values[i]
        lanes[:] = 0
        for j in range(row.size):
            x = np.float64(row[j])
            lanes[j & 7] += x * x
        total = 0.0
        for lane in lanes:
            total += lane
        norms[i] = np.sqrt(total)
