"""WUDI: the delta that interferes least with what every expert's own delta reads. Legend: as in
``mixmerge.methods.spectral``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixmerge.methods.descent import descend
from mixmerge.methods.lowrank import Delta, LowRank, add_to, square, stacked
from mixmerge.methods.records import Role
from mixmerge.methods.roles import Tables
from mixmerge.methods.spectral import by_matrix, cutoff

# Below this share of a pass over S, products with the factors are the cheaper way to D S.
_THIN = 0.5
_ROUNDING = 1e-12  # of a difference of float64 sums
_NEWTON = 100  # steps at most; ten are many


def wudi(
    deltas: Sequence[Delta],
    *,
    base: Tensor,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    solver: Literal["adam", "closed"] = "adam",
    steps: float = 300,
    lr: float = 1e-5,
    reach: float = 1.0,
    tables: Tables = "mean",
    tolerance: float | None = None,
    role: Role = "linear",
) -> Tensor:
    """The delta D of least interference, ``sum_t |(D - delta_t) delta_t.T|^2 / |delta_t|^2``.

    With ``S = sum_t delta_t.T delta_t / |delta_t|^2`` and ``C = sum_t delta_t (delta_t.T delta_t) / |delta_t|^2``
    the gradient is ``2 (D S - C)``: a step costs the same however many experts there are. ``adam`` starts at the
    sum of the deltas and takes ``steps`` steps; ``closed`` is the minimum of least norm, ``C S^+``, or where that is
    larger than ``reach`` the minimum among the D of norm ``reach * sum_t |delta_t|``, which is ``C (S + ridge I)^-1``.
    The published run is an early stop near the sum: the minimum has a lower objective, and need not have a better
    score. Tensors that are not matrices get the mean of the deltas.

    What makes ``reach`` necessary: S weighs a direction by the square of what an expert reads of it. Where one expert
    reads few directions (an adapter) and another all of them, most of them weakly, D gets right what the adapter reads
    by very large entries for what the other hardly reads, up to ``sqrt(cond S) / 2`` times an expert's norm. So it does
    where matrices have fewer rows than columns, as all experts then read some directions weakly. Any sum of deltas with
    coefficients from -1 to 1 is within ``reach: 1``.

    Source: Whoever Started the Interference Should End It (arXiv:2503.08099), WUDI-Merging.

    Args:
        deltas, base, tables, role: as in ``mixmerge.methods.spectral``.
        weight: a factor on each delta; 1 by default (the paper has none).
        lambda_: factor on D; 1 in the paper, which needs none.
        solver: ``adam`` (the paper) or ``closed``.
        steps: of Adam, 0 or more: 300 in the paper, 400 in FusionBench's configuration. 0 is the sum.
        lr: of Adam (its betas 0.9 and 0.999, its epsilon 1e-8).
        reach: of ``closed``, the largest norm of D as a share of the sum of the experts' norms, 0.01 or more; 1e6
            leaves the minimum what it is.
        tolerance: of ``closed``, the share of the largest singular value of the experts side by side below which a
            direction counts as absent, 0 to 0.99; by default float32's rounding times the longer side.

    Memory:
        beyond base and result, one delta, S (n x n), C, the sum and Adam's three buffers (m x n each), whatever T
        is; of R ranks of factors in all, R (R + 2 m + n) in place of S and C where 2 R <= n.

    Deviations:
        a zero delta takes no part (published: 0/0). ``closed``, and with it ``reach``, is not in the paper. S and C are
        made in float64.
    """

    def matrix(each: Sequence[Delta]) -> Tensor:
        problem = _problem(each)
        return (
            problem.closed(tolerance, float(reach))
            if solver == "closed"
            else problem.adam(int(steps), float(lr))
        )

    return by_matrix(deltas, matrix, base=base, weight=weight, lambda_=lambda_, role=role, tables=tables)


@dataclass(frozen=True)
class _Dense:
    """``start`` the sum of the deltas ``(m, n)``; in float64 ``s`` ``(n, n)``, ``c`` ``(m, n)`` and the sum of the
    deltas' norms ``norms`` ``()``."""

    start: Tensor
    s: Tensor
    c: Tensor
    norms: Tensor

    def adam(self, steps: int, lr: float) -> Tensor:
        dtype = self.start.dtype
        slope = self.start.double() @ self.s - self.c
        if _is_rounding(slope, self.c):
            return self.start
        first, s = (2 * slope).to(dtype), (2 * self.s).to(dtype)
        # The way from the start is what is descended: near it, C and D S are equal but for their rounding.
        way = descend(
            torch.zeros_like(self.start), lambda d, out: torch.addmm(first, d, s, out=out), steps=steps, lr=lr
        )
        return self.start.add_(way)

    def closed(self, tolerance: float | None, reach: float) -> Tensor:
        values, q = torch.linalg.eigh(self.s)
        along = self.c @ q
        along *= _inverse(values, along, cutoff(self.c.shape, tolerance), reach * float(self.norms))
        minimum: Tensor = along @ q.mT
        return minimum.to(self.start.dtype)


@dataclass(frozen=True)
class _Factored:
    """``s = a.T g a`` and ``c = h a``: ``a`` ``(R, n)``, ``g`` ``(R, R)``, ``h`` and ``b`` ``(m, R)``, in float64;
    ``norms`` the sum of the deltas' norms."""

    b: Tensor
    a: Tensor
    g: Tensor
    h: Tensor
    norms: float
    dtype: torch.dtype

    def adam(self, steps: int, lr: float) -> Tensor:
        slope = self.b @ (self.a @ self.a.mT) @ self.g - self.h
        first, g, a = (2 * slope).to(self.dtype), (2 * self.g).to(self.dtype), self.a.to(self.dtype)

        def gradient(d: Tensor, out: Tensor) -> Tensor:
            return torch.mm(torch.addmm(first, d @ a.mT, g), a, out=out)

        start = torch.zeros((len(self.b), a.shape[1]), dtype=self.dtype, device=a.device)
        way = start if _is_rounding(slope, self.h) else descend(start, gradient, steps=steps, lr=lr)
        return way.addmm_(self.b.to(self.dtype), a)

    def closed(self, tolerance: float | None, reach: float) -> Tensor:
        basis = torch.linalg.qr(self.a.mT)  # a.T = Q R, so s = Q (R g R.T) Q.T
        values, q = torch.linalg.eigh(basis.R @ self.g @ basis.R.mT)
        along = (self.h @ basis.R.mT) @ q
        along *= _inverse(
            values, along, cutoff((len(self.h), self.a.shape[1]), tolerance), reach * self.norms
        )
        minimum: Tensor = along @ (basis.Q @ q).mT
        return minimum.to(self.dtype)


def _is_rounding(slope: Tensor, terms: Tensor) -> bool:
    """Whether the start is the minimum, as that of one expert is: Adam would make steps of ``lr`` out of rounding."""
    return float(slope.abs().max()) <= _ROUNDING * float(terms.abs().max())


def _inverse(values: Tensor, along: Tensor, limit: float, radius: float) -> Tensor:
    """One over each eigenvalue of S that counts, all of them raised as little as makes a minimum of norm ``radius``.

    Args:
        values: eigenvalues of S, rising, ``(r,)``.
        along: C along its eigenvectors, ``(m, r)``.
        limit: S has the squares of the singular values this share is for.
        radius: largest norm of ``along * inverse``, which falls as the ridge grows.
    """
    low = max(limit, torch.finfo(torch.float64).eps ** 0.5) ** 2
    kept = values > low * values[-1:].clamp(min=0)
    inverse = torch.where(kept, 1 / values.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    energy = along.square().sum(0)
    ridge = 0.0
    for _ in range(_NEWTON):
        square = float((energy * inverse.square()).sum())
        if square <= radius**2 * (1 + _ROUNDING):
            break
        # Newton on 1 / norm, which is concave: from 0 every step is short of the root, so the ridge is the least.
        norm = square**0.5
        ridge += (norm / radius - 1) * square / float((energy * inverse**3).sum())
        inverse = torch.where(kept, 1 / (values + ridge), 0.0)
    return inverse


def _problem(each: Sequence[Delta]) -> _Dense | _Factored:
    """S and C of all experts, each of whom is indexed once; thin factors stay factors."""
    parts: list[LowRank] = []
    dense: _Dense | None = None
    for index in range(len(each)):
        delta = each[index]
        if dense is None and isinstance(delta, LowRank):
            ranks = delta.rank + sum(part.rank for part in parts)
            if ranks <= _THIN * delta.shape[1]:
                parts.append(delta)
                continue
        if dense is None:
            dense = _empty(delta)
            for part in parts:
                _take(dense, part)
        _take(dense, delta)
    return _factored(parts) if dense is None else dense


def _empty(delta: Delta) -> _Dense:
    (m, n), device = delta.shape, delta.device
    return _Dense(
        torch.zeros((m, n), dtype=delta.dtype, device=device),
        torch.zeros((n, n), dtype=torch.float64, device=device),
        torch.zeros((m, n), dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )


def _take(into: _Dense, delta: Delta) -> None:
    """Add one expert's part to the sums."""
    add_to(into.start, delta)
    norm = square(delta)
    if norm == 0:
        return
    into.norms.add_(norm**0.5)
    if isinstance(delta, LowRank):
        b, a = delta.b.double(), delta.a.double()
        inner = (b.mT @ b) / norm
        into.s.add_(a.mT @ (inner @ a))
        into.c.add_((b @ ((a @ a.mT) @ inner)) @ a)
        return
    x = delta.double()
    scaled = x / norm
    into.s.addmm_(scaled.mT, x)
    into.c.add_((x @ x.mT) @ scaled if x.shape[0] < x.shape[1] else x @ (x.mT @ scaled))


def _factored(parts: Sequence[LowRank]) -> _Factored:
    whole, dtype = stacked(parts), parts[0].dtype
    g = torch.zeros((whole.rank, whole.rank), dtype=torch.float64, device=whole.device)
    h = torch.zeros(whole.b.shape, dtype=torch.float64, device=whole.device)
    at, norms = 0, 0.0
    for part in parts:
        norm, own = square(part), slice(at, at + part.rank)
        at += part.rank
        if norm:
            norms += norm**0.5
            b, a = part.b.double(), part.a.double()
            g[own, own] = (b.mT @ b) / norm
            h[:, own] = b @ ((a @ a.mT) @ g[own, own])
    return _Factored(whole.b.double(), whole.a.double(), g, h, norms, dtype)
