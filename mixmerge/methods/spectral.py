"""What the spectral methods share: which tensors are matrices, singular triplets, orthogonal factors.

Legend: m rows (outputs) and n columns (inputs) of a matrix, k = min(m, n), T experts, r a rank, E matrices of a stack.

Decompositions are those of the smaller Gram matrix in float64, which of float32 values are as accurate as a float32
SVD down to singular values of 1e-7 of the largest, and several times as fast. Singular values below
``tolerance`` times the largest are no directions but rounding: they are left out. ``tolerance: 0`` keeps all k of
them, as the published programs do, by an SVD; of factors, as many as their rank. No gradients are taken.

Arguments of all methods that use it, ``S`` the shape of the tensor, as is that of the result:

    deltas, base: one tensor group, ``S`` each; a delta may be low-rank factors, which are never multiplied out whole.
    lambda_: factor on what is merged.
    tables: ``mean`` (for ``doge_ta`` ``base``) or ``spectral``: what embeddings and heads over a vocabulary get, the
        same as other tensors that are no matrices, or the method.
    tolerance: 0 to 0.99; by default float32's rounding times the longer side.
    role: what the tensor is for. Inputs are the columns, of a Conv1D (``transposed``) the rows. Three dimensions are a
        stack of matrices (``roles.is_matrix``), outputs x inputs unless they are ``transposed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mixmerge.methods.lowrank import Delta, LowRank, add_to
from mixmerge.methods.records import Role
from mixmerge.methods.roles import Tables, is_matrix

_SVD_BELOW = 1e-6  # a Gram matrix in float64 tells singular values apart down to the root of its rounding


@dataclass(frozen=True)
class Triplets:
    """``u @ diag(s) @ v.mT``: orthonormal columns ``u`` ``(m, r)`` and ``v`` ``(n, r)``, ``s`` ``(r,)`` falling."""

    u: Tensor
    s: Tensor
    v: Tensor


class View(Sequence[Delta]):
    """The deltas of one matrix, each made when it is asked for: scaled, and transposed if it is stored so.

    Args:
        deltas: of the tensor.
        weight: one factor for each, or none.
        turned: transpose them.
        number: which matrix of a stack; None where the tensor is one.
    """

    def __init__(
        self, deltas: Sequence[Delta], weight: Sequence[float] | None, *, turned: bool, number: int | None
    ) -> None:
        part = getattr(deltas, "part", None)  # what reads from disk can read one matrix of a stack alone
        self._from = deltas if number is None or part is None else part(number)
        self._number = number if part is None else None
        self._weight, self._turned = weight, turned

    def __len__(self) -> int:
        return len(self._from)

    @overload
    def __getitem__(self, index: int) -> Delta: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Delta]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        delta: Any = self._from[index]
        delta = delta if self._number is None else delta[self._number]
        delta = delta.mT if self._turned else delta
        factor = 1.0 if self._weight is None else float(self._weight[index])
        return delta if factor == 1.0 else delta * factor


def matrices(
    deltas: Sequence[Delta], weight: Sequence[float] | None, *, shape: Sequence[int], role: Role
) -> Iterator[tuple[int | None, View]]:
    """Of each matrix that a tensor is or holds, its number (None if it is the tensor) and deltas, outputs x inputs."""
    for number in [None] if len(shape) == 2 else range(shape[0]):
        yield number, View(deltas, weight, turned=role == "transposed", number=number)


def by_matrix(
    deltas: Sequence[Delta],
    matrix: Callable[[Sequence[Delta]], Tensor],
    *,
    base: Tensor,
    weight: Sequence[float] | None,
    lambda_: float,
    role: Role,
    tables: Tables,
    rest: Literal["mean", "base"] = "mean",
) -> Tensor:
    """``base + lambda * merged``: by ``matrix`` where the tensor is one, else the mean of the deltas, or nothing.

    Args:
        deltas: ``S`` each; read once for each time ``matrix`` indexes them.
        matrix: the merged ``(m, n)`` of the deltas ``(m, n)`` of one matrix, outputs x inputs.
        base: ``S``.
        weight: a factor on each delta before anything else.
        lambda_: factor on what is merged.
        role: ``transposed`` is turned to outputs x inputs and back.
        tables: ``spectral`` takes tables for matrices; otherwise they are of the rest.
        rest: what tensors get that are no matrices.
    """
    if is_matrix(base.shape, role, tables):
        merged = torch.empty_like(base)
        for number, each in matrices(deltas, weight, shape=base.shape, role=role):
            found = matrix(each)
            found = found.mT if role == "transposed" else found
            (merged if number is None else merged[number]).copy_(found)
    elif rest == "base":
        return base.clone()
    else:
        merged = torch.zeros_like(base)
        view = View(deltas, weight, turned=False, number=None)
        for index in range(len(view)):
            add_to(merged, view[index])
        merged /= len(view)
    return merged.mul_(float(lambda_)).add_(base)


def cutoff(shape: Sequence[int], tolerance: float | None) -> float:
    """The tolerance, by default float32's rounding over the longer side."""
    return max(shape[-2:]) * torch.finfo(torch.float32).eps if tolerance is None else float(tolerance)


def triplets(
    delta: Delta, *, tolerance: float | None, count: int | None = None, scale: float = 0.0
) -> Triplets:
    """The leading singular triplets of a matrix, in its dtype.

    Args:
        delta: ``(m, n)``; of factors only matrices of their rank are decomposed, after a QR of each.
        tolerance: as in the module's docstring; None is ``max(m, n)`` times float32's rounding.
        count: at most so many.
        scale: a singular value the tolerance also holds against, where the matrix is what is left of a larger one.

    Returns:
        r triplets, r from 0 to k.
    """
    limit = cutoff(delta.shape, tolerance)
    if isinstance(delta, LowRank):
        left, right = torch.linalg.qr(delta.b.double()), torch.linalg.qr(delta.a.double().mT)
        u, s, vt = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
        kept = _kept(s, limit, count, scale)
        # Beyond the rank of the factors there is nothing to keep, whatever the tolerance.
        kept = min(kept, int((s > s[:1] * torch.finfo(torch.float64).eps * len(s)).sum()))
        u, v = left.Q @ u[:, :kept], right.Q @ vt[:kept].mT
    elif limit < _SVD_BELOW or delta.dtype == torch.float64:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        kept = _kept(s, limit, count, scale)
        # Copies: a part that is a view would keep all k vectors in memory, for each expert of a stack.
        u, v = u[:, :kept].clone(), vt[:kept].mT.clone()
    else:
        x = delta.double()
        tall = x.shape[0] >= x.shape[1]
        squares, vectors = torch.linalg.eigh(x.mT @ x if tall else x @ x.mT)
        s = squares.clamp(min=0).sqrt().flip(0)
        kept = _kept(s, limit, count, scale)
        small = vectors.flip(1)[:, :kept]
        large = ((x if tall else x.mT) @ small) / s[:kept]
        u, v = (large, small) if tall else (small, large)
    return Triplets(u.to(delta.dtype), s[:kept].to(delta.dtype), v.to(delta.dtype))


def _kept(s: Tensor, limit: float, count: int | None, scale: float) -> int:
    """How many singular values count; a zero matrix has none, whatever the tolerance."""
    if not s.numel() or float(s[0]) <= limit * scale or float(s[0]) == 0:
        return 0
    above = int((s > limit * max(float(s[0]), scale)).sum()) if limit > 0 else len(s)
    return above if count is None else min(above, count)


def orthogonal(columns: Tensor, tolerance: float | None) -> Tensor:
    """The nearest matrix with orthonormal columns: ``P @ Q.mT`` of the SVD ``P D Q.mT``, ``(m, r)`` to ``(m, r)``.

    Where columns depend on each other, only their span is used: an SVD would make up the directions that lack.
    """
    limit = cutoff(columns.shape, tolerance)
    if limit < _SVD_BELOW:
        p, d, qt = torch.linalg.svd(columns, full_matrices=False)
        kept = _kept(d, limit, None, 0.0)
        found: Tensor = p[:, :kept] @ qt[:kept]
        return found
    x = columns.double()
    squares, q = torch.linalg.eigh(x.mT @ x)
    kept = squares > (limit * squares[-1:].clamp(min=0).sqrt()) ** 2
    inverse = torch.where(kept, squares.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    nearest: Tensor = x @ ((q * inverse) @ q.mT)
    return nearest.to(columns.dtype)
