"""Rows of a low-rank product, summed in one fixed order, and the row norms DoRA needs.

BLAS is not used: its blocking, and with it the last bits of a result, depends on the machine, the threads and
how many rows are asked for. Here an entry is a sum over the rank in ascending order, every product and every
sum rounded once to float32 (no fused multiply-add), so the bytes do not depend on how the rows are split.

Shapes: R rows, C columns, K rank, G groups of R / G rows that share a right factor (an MoE tensor's experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mixmerge.kernels import loops
from mixmerge.kernels.layout import RANK_STEP, TILE

if TYPE_CHECKING:
    import torch


def pad(factor: np.ndarray, *, axis: int) -> np.ndarray:
    """A contiguous float32 copy of ``factor``, its rank ``axis`` filled up with zeros to a multiple of
    ``RANK_STEP``, which change no sum."""
    shape = list(factor.shape)
    shape[axis] += -shape[axis] % RANK_STEP
    padded = np.zeros(shape, dtype=np.float32)
    padded[tuple(slice(size) for size in factor.shape)] = factor
    return padded


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
    spare = np.empty((3, TILE), np.float32)
    at = start
    while at < stop:
        group = at // per_group
        end = min(stop, (group + 1) * per_group)
        loops.product(left[at:end], right[group], out[at - start : end - start], spare)
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


def row_norms(values: np.ndarray) -> np.ndarray:
    """The Euclidean norm of every row of ``(n, C)`` float32, summed in eight float64 lanes: ``(n,)`` float64.

    A norm is a function of its row alone, so no split of the rows changes it.
    """
    norms = np.empty(len(values))
    loops.row_norms(values, np.empty(8), norms)
    return norms


def row_norms_reference(values: torch.Tensor) -> torch.Tensor:
    """The plain definition of row_norms(), equal to it to float64 rounding."""
    import torch

    return torch.sqrt(torch.sum(values.double() ** 2, dim=1))
