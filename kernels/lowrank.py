"""Rows of a low-rank product, summed in one fixed order, and the row norms DoRA needs.

BLAS is not used: its blocking, and with it the last bits of a result, depends on the machine, the threads and
how many rows are asked for. Here an entry is a sum over the rank in ascending order, every product and every
sum rounded once to float32 (no fused multiply-add), so the bytes do not depend on how the rows are split.

Shapes: R rows, C columns, K rank, G groups of R / G rows that share a right factor (an MoE tensor's experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import torch

# The kernel takes the rank four at a time; pad() fills it up with zeros, which change no sum.
RANK_STEP = 4
# Columns done at once: four rows of `right` and of the output then stay in a 48 KiB first-level cache.
TILE = 1024


def pad(factor: np.ndarray, *, axis: int) -> np.ndarray:
    """A contiguous float32 copy of ``factor``, its rank ``axis`` filled up to a multiple of ``RANK_STEP``."""
    shape = list(factor.shape)
    shape[axis] += -shape[axis] % RANK_STEP
    padded = np.zeros(shape, dtype=np.float32)
    padded[tuple(slice(size) for size in factor.shape)] = factor
    return padded


@njit(nogil=True, cache=True)
def _product(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:  # (n, K), (K, C) -> (n, C)
    rows, rank = left.shape
    columns = right.shape[1]
    spare = np.empty((3, min(TILE, columns)), dtype=np.float32)  # for what rows past the last one would get
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


def product(left: np.ndarray, right: np.ndarray, *, start: int, stop: int, out: np.ndarray) -> None:
    """Rows ``start`` to ``stop`` of ``left @ right`` into ``out``; releases the GIL.

    Args:
        left: ``(R, K)`` float32 as pad() makes it, any scale already in it.
        right: ``(G, K, C)`` float32 as pad() makes it; row i uses ``right[i // (R // G)]``.
        start: first row.
        stop: one past the last row, at most R.
        out: ``(stop - start, C)`` contiguous float32, overwritten.
    """
    per_group = left.shape[0] // right.shape[0]
    at = start
    while at < stop:
        group = at // per_group
        end = min(stop, (group + 1) * per_group)
        _product(left[at:end], right[group], out[at - start : end - start])
        at = end


def product_reference(left: torch.Tensor, right: torch.Tensor, *, start: int, stop: int) -> torch.Tensor:
    """The plain definition of product(), equal to it to the last bit: ``(stop - start, C)``."""
    import torch

    rows = torch.arange(start, stop)
    mine = right[rows // (left.shape[0] // right.shape[0])]  # (n, K, C)
    total = torch.zeros(len(rows), right.shape[2])
    for k in range(left.shape[1]):
        total = total + left[rows, k, None] * mine[:, k]
    return total


@njit(nogil=True, cache=True)
def row_norms(values: np.ndarray) -> np.ndarray:
    """The Euclidean norm of every row of ``(n, C)`` float32, summed in eight float64 lanes: ``(n,)`` float64.

    A norm is a function of its row alone, so no split of the rows changes it.
    """
    rows, columns = values.shape
    norms = np.empty(rows, dtype=np.float64)
    lanes = np.empty(8, dtype=np.float64)
    for i in range(rows):
        row = values[i]
        lanes[:] = 0
        for j in range(columns):
            x = np.float64(row[j])
            lanes[j & 7] += x * x
        total = 0.0
        for lane in lanes:
            total += lane
        norms[i] = np.sqrt(total)
    return norms


def row_norms_reference(values: torch.Tensor) -> torch.Tensor:
    """The plain definition of row_norms(), equal to it to float64 rounding."""
    import torch

    return torch.sqrt(torch.sum(values.double() ** 2, dim=1))
