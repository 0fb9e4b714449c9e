"""Exact order statistics of a whole model's values, without sorting them or holding them.

A float32 is 32 bits whose order is the order of the numbers once negative ones are turned around. One pass counts
the upper 16 bits of all values, which says in which of 65,536 bins the k-th value lies; a second counts the lower
16 bits of the values in that bin, which says which value it is. Counts add up over tensors, so both are passes of a
``Sketch``: ``upper_counts``, add, ``locate``; ``lower_counts``, add, ``values``. Several rows (experts) and several
ranks go through the same two passes, at half a megabyte for each row and then for each rank.

Values are float32; others are rounded to it first. -0 is 0. NaN cannot be: the engine refuses it before.
Legend: ``S`` any shape, ``R`` rows, ``W`` wanted ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 65_536
BLOCK = 1 << 20  # entries looked at together: what is made of them on the way stays in the megabytes

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Sought:
    """An order statistic of which the bin is known.

    Args:
        row: of which row.
        rank: which of its values: 1 is the smallest.
        bin: the upper 16 bits of the value, in order: 0 to 65,535.
        less: how many values are in lower bins.
    """

    row: int
    rank: int
    bin: int
    less: int


def from_top(total: int, k: int) -> int:
    """The rank of the ``k``-th largest of ``total`` values, 1 <= k <= total."""
    return total - k + 1


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one size, flat, in pieces of at most ``BLOCK`` entries, side by side."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        yield tuple(each[start : start + BLOCK] for each in flat)


def ordered(values: Tensor) -> Tensor:
    """Whole numbers in the order of the values, equal where they are equal: ``S`` to ``S``, int32."""
    bits = (values.detach().float() + 0.0).view(torch.int32)  # -0 + 0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def upper_counts(values: Tensor) -> Counts:
    """How many values have each upper half: ``S`` to ``(65536,)``, lowest values first."""
    counts: Counts = np.zeros(BINS, np.int64)
    for (block,) in blocks(values):
        counts += np.bincount((ordered(block).cpu().numpy() >> 16) + BINS // 2, minlength=BINS)
    return counts


def lower_counts(values: Tensor, sought: Sequence[Sought]) -> Counts:
    """How many values of the bin of each that is sought have each lower half: ``S`` to ``(len(sought), 65536)``.

    Args:
        values: of one tensor of one row.
        sought: those of that row.
    """
    counts: Counts = np.zeros((len(sought), BINS), np.int64)
    for (block,) in blocks(values):
        keys = ordered(block).cpu().numpy()
        upper = keys >> 16
        for at, each in enumerate(sought):
            inside = keys[upper == each.bin - BINS // 2]
            if len(inside):
                counts[at] += np.bincount(inside & 0xFFFF, minlength=BINS)
    return counts


def locate(counts: Counts, wanted: Sequence[tuple[int, int]]) -> tuple[Sought, ...]:
    """The bins of order statistics, after the first pass.

    Args:
        counts: ``(R, 65536)``, the sums of ``upper_counts``; ``counts.sum(axis=1)`` are the rows' sizes.
        wanted: ``W`` pairs of row and rank; 1 is the smallest, and no rank is above the row's size.

    Raises:
        ValueError: a rank the row does not have.
    """
    found = []
    for row, rank in wanted:
        running = np.cumsum(counts[row])
        total = int(running[-1])
        if not 1 <= rank <= total:
            raise ValueError(f"rank {rank} of {total} values")
        at = int(np.searchsorted(running, rank))
        found.append(Sought(row, rank, at, int(running[at - 1]) if at else 0))
    return tuple(found)


def values(counts: Counts, sought: Sequence[Sought]) -> tuple[float, ...]:
    """The order statistics, after the second pass.

    Args:
        counts: ``(W, 65536)``, the sums of ``lower_counts``, in the order of ``sought``.
        sought: what ``locate`` found.
    """
    found = []
    for bins, each in zip(counts, sought, strict=True):
        low = int(np.searchsorted(np.cumsum(bins), each.rank - each.less))
        found.append(_value(each.bin, low))
    return tuple(found)


def _value(upper: int, lower: int) -> float:
    key = (upper - BINS // 2) << 16 | lower
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return float(np.array(bits, np.int32).view(np.float32))
