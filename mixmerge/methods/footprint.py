"""What the definitions of the methods hold at once of one tensor, so that a plan can say it. Imports no torch.

In numbers of the dtype a tensor is merged in (float32), from what the definitions say under Memory and from the
temporaries they make; a float64 counts twice. Upper bounds: some terms are not there at the same time. ``tests`` hold
them against measured peaks.

Legend: as in ``mixmerge.methods.spectral``; R the ranks of all deltas that are factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.methods.records import Method, Role
from mixmerge.methods.roles import is_matrix
from mixmerge.registry import load

# Base and result; the input being read as stored and as it is merged, what is subtracted, and where it is finite.
_READING = 6
# Entries that a pass over the model looks at together, and how many numbers it makes of each.
_BLOCK, _OF_A_BLOCK = 1 << 20, 8
# Of each order statistic that is looked for: counts of 65,536 bins in 64 bits, of one tensor and of all, and copies.
_OF_A_ROW = 12 * 65_536
# Inputs and their masks, weighted and sparsified copies, for a definition that says nothing of itself.
_UNKNOWN = 4


@dataclass(frozen=True)
class Sizes:
    """One tensor group in numbers.

    Args:
        shape: of the tensor.
        role: what it is for.
        experts: T.
        parameters: the method's, by name.
        ranks: of each expert's factors; empty where a delta is no product of two.
    """

    shape: Sequence[int]
    role: Role
    experts: int
    parameters: Mapping[str, Any]
    ranks: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """m and n: outputs and inputs."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.role == "transposed" else (rows, columns)

    @property
    def spectral(self) -> bool:
        """Whether the spectral methods take it for a matrix, or a stack of them."""
        return is_matrix(self.shape, self.role, self.parameters.get("tables") or "mean")


def held(method: Method, sizes: Sizes) -> int:
    """Numbers that merging a tensor by a method's definition holds at most, with what is read and written.

    Args:
        method: the row; one that names no ``footprint`` is taken to hold four copies of every input.
        sizes: the tensor.
    """
    own = load(method.footprint) if method.footprint else unknown
    return _READING * sizes.elements + int(own(sizes))


def unknown(sizes: Sizes) -> int:
    """A definition that is given all inputs at once and says no more."""
    return (_UNKNOWN * sizes.experts + 4) * sizes.elements


def magmax(sizes: Sizes) -> int:
    """The largest so far and what was taken, and what they are compared and chosen by."""
    return 5 * sizes.elements


def emr(sizes: Sizes) -> int:
    """The sum, the largest, signs."""
    return 6 * sizes.elements


def tall(sizes: Sizes) -> int:
    """The sum, what it is compared by, how many experts need an entry; of ``multi: ties`` the trimmed and the signs."""
    ties = sizes.parameters.get("multi") == "ties"
    passes = _passing(sizes, sizes.experts) if ties else 0
    return (11 if ties else 7) * sizes.elements + passes


def pcb(sizes: Sizes) -> int:
    """Two sums, what the others sum up to, and blocks; two of its forms hold all deltas."""
    held_whole = sizes.parameters.get("inter") in ("pairwise", "softmax")
    pairs = sizes.experts * (sizes.experts + 3) // 2 if sizes.parameters.get("inter") == "softmax" else 0
    passes = _passing(sizes, max(sizes.experts, pairs))
    return (7 + (sizes.experts if held_whole else 0)) * sizes.elements + passes


def _passing(sizes: Sizes, rows: int) -> int:
    """A pass over the model, for thresholds of so many rows."""
    return _OF_A_BLOCK * min(_BLOCK, sizes.elements) + rows * _OF_A_ROW


def tsv_m(sizes: Sizes) -> int:
    """The stack of the experts' triplets, and one expert's decomposition or its orthogonalisation."""
    if not sizes.spectral:
        return _mean(sizes)
    m, n = sizes.matrix
    count = max(1, min(m, n) // sizes.experts)
    columns = sum(min(count, rank) for rank in sizes.ranks) if sizes.ranks else count * sizes.experts
    stack = 2 * (m + n) * columns
    return _part(sizes) + stack + max(_triplets(m, n, _widest(sizes)), _turned(m, n, columns))


def iso_c(sizes: Sizes) -> int:
    """The sum and its decomposition."""
    if not sizes.spectral:
        return _mean(sizes)
    m, n = sizes.matrix
    return _part(sizes) + m * n + _triplets(m, n, _thin(sizes, min(m, n))) + 2 * m * n


def directions(sizes: Sizes) -> int:
    """U and V of every matrix of a tensor."""
    return sum(sizes.shape[-2:]) * most_directions(sizes)


def most_directions(sizes: Sizes) -> int:
    """Singular values that the sum of all deltas has at most: k of each matrix, of factors their ranks added up."""
    if not sizes.spectral:
        return 0
    return math.prod(sizes.shape[:-2]) * min(*sizes.matrix, sum(sizes.ranks) or sizes.shape[-1])


def iso_cts(sizes: Sizes) -> int:
    """As ``iso_c``, and every expert's own triplets beside the sum's."""
    if not sizes.spectral:
        return _mean(sizes)
    m, n = sizes.matrix
    columns = min(m, n, sum(sizes.ranks) or min(m, n))
    own = 3 * m * n * (not sizes.ranks) + _triplets(m, n, _widest(sizes))
    return max(iso_c(sizes), _part(sizes) + 3 * (m + n) * columns + max(own, _turned(m, n, columns)))


def wudi(sizes: Sizes) -> int:
    """S and C in float64, one expert's part of them, then Adam or an eigendecomposition."""
    if not sizes.spectral:
        return _mean(sizes)
    m, n = sizes.matrix
    closed = sizes.parameters.get("solver") == "closed"
    thin = sum(_thin(sizes, n // 2))
    if thin:
        factors = 8 * thin * (m + n) + 20 * thin**2
        return _part(sizes) + factors + (4 if closed else 8) * m * n
    sums, taking = 2 * n * n + 3 * m * n, 6 * m * n + 2 * min(m, n) ** 2
    adam = 11 * m * n + 3 * n * n
    return _part(sizes) + sums + max(taking, 8 * n * n + 5 * m * n if closed else adam)


def doge_ta(sizes: Sizes) -> int:
    """All deltas, what they span, and Adam; a pass over the model before."""
    if not sizes.spectral:
        return sizes.elements
    m, n = sizes.matrix
    count = max(1, min(m, n) // sizes.experts)
    thin = sum(_thin(sizes, min(m, n)))
    deltas = thin * (m + n) if thin else sizes.experts * m * n
    columns = min(thin, count * sizes.experts) if thin else count * sizes.experts
    spanning = max(_triplets(m, n, _widest(sizes) if thin else ()), _triplets(m, columns, ()))
    own = deltas + 2 * m * columns + max(spanning, 9 * m * n)
    return _part(sizes) + max(own, _passing(sizes, sizes.experts))


def chunked(sizes: Sizes) -> int:
    """All deltas, and of each expert the weight of every entry in float64."""
    return unknown(sizes) + 2 * sizes.experts * sizes.elements


def fisher(sizes: Sizes) -> int:
    """All experts and their statistics, two sums."""
    return (2 * sizes.experts + 6) * sizes.elements


def regmean(sizes: Sizes) -> int:
    """All experts, their Gram matrices in float64, the sum, its root and what is solved."""
    if sizes.role not in ("linear", "transposed") or len(sizes.shape) != 2:
        return (sizes.experts + 4) * sizes.elements
    n = sizes.matrix[1]
    return (sizes.experts + 12) * sizes.elements + 2 * (sizes.experts + 5) * n * n


def activation_ties(sizes: Sizes) -> int:
    """All deltas, what is kept of them, both weighted; one's scores in order."""
    return (3 * sizes.experts + 14) * sizes.elements


def _mean(sizes: Sizes) -> int:
    return 2 * sizes.elements


def _part(sizes: Sizes) -> int:
    """What is read of one matrix of a stack, beside the stack."""
    m, n = sizes.matrix
    return 5 * m * n if len(sizes.shape) > 2 else 0


def _thin(sizes: Sizes, most: int) -> tuple[int, ...]:
    """The ranks of the factors if they stay factors: up to ``most`` in all."""
    return (sum(sizes.ranks),) if sizes.ranks and sum(sizes.ranks) <= most else ()


def _widest(sizes: Sizes) -> tuple[int, ...]:
    return (max(sizes.ranks),) if sizes.ranks else ()


def _triplets(m: int, n: int, ranks: Sequence[int]) -> int:
    """One decomposition: in float64 the Gram matrix, its vectors and LAPACK's room; of factors, of their rank."""
    k = min(m, n)
    if ranks:
        return 8 * (m + n) * ranks[0] + 12 * ranks[0] ** 2
    return 2 * m * n + max(8 * k * k, 4 * k * k + 2 * (m + n) * k)


def _turned(m: int, n: int, r: int) -> int:
    """``(m, r)`` and ``(n, r)`` made orthogonal one after the other, in float64, and multiplied."""
    return max(m, n) * r + 5 * max(m, n) * r + 8 * r * r + m * n
