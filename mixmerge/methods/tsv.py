"""Merging by task singular vectors. Legend: as in ``mixmerge.methods.spectral``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.methods.lowrank import Delta
from mixmerge.methods.records import Role
from mixmerge.methods.roles import Tables
from mixmerge.methods.spectral import by_matrix, orthogonal, triplets


def tsv_m(
    deltas: Sequence[Delta],
    *,
    base: Tensor,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    tables: Tables = "mean",
    tolerance: float | None = None,
    role: Role = "linear",
) -> Tensor:
    """The leading singular triplets of every delta, made orthogonal to each other and added.

    Of each delta ``U_t S_t V_t.T`` the first ``max(1, floor(k / T))`` triplets are kept; ``U = [U_1 .. U_T]`` and
    ``V`` alike are replaced by the nearest orthonormal ``P Q.T`` of their SVDs; the delta is ``U diag(S) V.T``.
    Tensors that are not matrices get the mean of the deltas.

    Source: Task Singular Vectors (arXiv:2412.00081), TSV-Merge.

    Args:
        deltas, base, tables, tolerance, role: as in ``mixmerge.methods.spectral``.
        weight: a factor on each delta before its SVD (the released code's alpha as a list); 1 by default.
        lambda_: the paper's alpha; 1 there.

    Memory:
        beyond base and result, one delta and its SVD, and the stack: ``T max(1, floor(k / T))`` columns of m and of n
        entries, which is at most ``max(k, T)``. It grows with T only where T > k.

    Deviations:
        more experts than k still keep one triplet each (published: none); a zero delta has no triplets
        (published: arbitrary ones, which turn the others); where triplets of experts coincide, their span is
        orthogonalised and nothing is made up beyond it, but for ``tolerance: 0``, which is as published;
        embeddings are not decomposed, but for ``tables: spectral``.
    """
    count = len(deltas)

    def matrix(each: Sequence[Delta]) -> Tensor:
        found = []
        for index in range(count):
            delta = each[index]
            found.append(triplets(delta, tolerance=tolerance, count=max(1, min(delta.shape) // count)))
        u, v = torch.cat([one.u for one in found], 1), torch.cat([one.v for one in found], 1)
        if not u.shape[1]:
            return u.new_zeros(u.shape[0], v.shape[0])
        s = torch.cat([one.s for one in found])
        return (orthogonal(u, tolerance) * s) @ orthogonal(v, tolerance).mT

    return by_matrix(deltas, matrix, base=base, weight=weight, lambda_=lambda_, role=role, tables=tables)
