"""Merging with all singular values made equal. Legend: as in ``mixmerge.methods.spectral``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.methods.lowrank import Delta, LowRank, square, total
from mixmerge.methods.records import Role
from mixmerge.methods.roles import Tables
from mixmerge.methods.spectral import Triplets, by_matrix, orthogonal, triplets


def iso_c(
    deltas: Sequence[Delta],
    *,
    base: Tensor,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    tables: Tables = "mean",
    tolerance: float | None = None,
    role: Role = "linear",
) -> Tensor:
    """The sum of the deltas with every singular value replaced by their mean: ``mean(S) U V.T``.

    The nuclear norm stays what it was. Tensors that are not matrices get the mean of the deltas.

    Source: No Task Left Behind (arXiv:2502.04959), Iso-C.

    Args:
        deltas, base, tables, role: as in ``mixmerge.methods.spectral``.
        weight: a factor on each delta; 1 by default (the paper has none).
        lambda_: the paper's alpha, which it tunes on validation data; 1 by default.
        tolerance: as there, of the sum; of factors whose ranks add up to more than k, 0 keeps all k.

    Memory:
        beyond base and result, one delta, the sum and its SVD, whatever T is.

    Deviations:
        restricted to the numerical rank of the sum: the published method also gives the k - r directions
        without any delta the mean singular value, so most of the energy of a sum of LoRA experts is noise.
    """

    def matrix(each: Sequence[Delta]) -> Tensor:
        found = triplets(total(each), tolerance=tolerance)
        if not len(found.s):
            return found.u.new_zeros(found.u.shape[0], found.v.shape[0])
        return (found.u * found.s.mean()) @ found.v.mT

    return by_matrix(deltas, matrix, base=base, weight=weight, lambda_=lambda_, role=role, tables=tables)


def iso_cts(
    deltas: Sequence[Delta],
    *,
    base: Tensor,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    common_fraction: float = 0.8,
    tables: Tables = "mean",
    tolerance: float | None = None,
    role: Role = "linear",
) -> Tensor:
    """As ``iso_c``, with the last directions of the sum replaced by each expert's own.

    Of the r directions of the sum the first ``c`` are common, ``c = floor(fraction * r)`` moved to where T divides
    r - c. Each delta without its part in them, ``(I - U_c U_c.T) delta``, gives its first (r - c) / T triplets. U
    and V of all are made orthonormal (``P Q.T`` of their SVDs), and all singular values replaced by their mean.

    Source: No Task Left Behind (arXiv:2502.04959), Iso-CTS.

    Args: as ``iso_c``, and
        common_fraction: share of the directions that are the sum's, 0 to 1; 0.8 in the paper.

    Memory:
        beyond base and result, one delta and its SVD, the sum, and k columns of m and of n entries, whatever T is.
        Every delta is read twice.

    Deviations:
        r is the numerical rank of the sum, the published k with ``tolerance: 0``; an expert with nothing of its
        own beyond the common directions adds none (published: rounding errors, scaled up). Where T is more than
        twice r - c, the division leaves no own directions, and the result is that of ``iso_c``, as published.
    """
    count = len(deltas)

    def matrix(each: Sequence[Delta]) -> Tensor:
        whole = triplets(total(each), tolerance=tolerance)
        rank = len(whole.s)
        if not rank:
            return whole.u.new_zeros(whole.u.shape[0], whole.v.shape[0])
        own = own_directions(rank, count, common_fraction)
        common = rank - own * count
        u = whole.u[:, :common]
        found = [Triplets(u, whole.s[:common], whole.v[:, :common])]
        for index in range(count if own else 0):
            delta = each[index]
            # What is left of a delta is rounding or not by the delta's size: the root mean square of its k values.
            scale = (square(delta) / min(delta.shape)) ** 0.5
            found.append(triplets(_without(delta, u), tolerance=tolerance, count=own, scale=scale))
        left = orthogonal(torch.cat([one.u for one in found], 1), tolerance)
        right = orthogonal(torch.cat([one.v for one in found], 1), tolerance)
        return (left * torch.cat([one.s for one in found]).mean()) @ right.mT

    return by_matrix(deltas, matrix, base=base, weight=weight, lambda_=lambda_, role=role, tables=tables)


def own_directions(rank: int, count: int, common_fraction: float) -> int:
    """How many of ``rank`` directions each of ``count`` experts has of its own."""
    own = round((rank - int(rank * common_fraction)) / count)
    return min(own, rank // count)


def _without(delta: Delta, u: Tensor) -> Delta:
    """``(I - u u.T) delta``."""
    if isinstance(delta, LowRank):
        return LowRank(delta.b - u @ (u.mT @ delta.b), delta.a)
    return delta - u @ (u.mT @ delta)
