"""A delta that is a product of two thin factors, and what the methods need of a delta without its entries.

Legend: a delta is ``(m, n)``, its factors ``b`` ``(m, r)`` and ``a`` ``(r, n)``; a stack of E matrices has a leading E.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 20  # entries of a product that are made at a time


@dataclass(frozen=True)
class LowRank:
    """``b @ a``, never multiplied out: what a LoRA adapter adds to a matrix.

    Args:
        b: ``(m, r)`` or ``(E, m, r)``, every scale already in it.
        a: ``(r, n)`` or ``(E, r, n)``.
    """

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.b.shape[:-1], self.a.shape[-1]))

    @property
    def ndim(self) -> int:
        return self.b.ndim

    @property
    def rank(self) -> int:
        """r: an upper bound of the rank of the product."""
        return self.b.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.b.dtype

    @property
    def device(self) -> torch.device:
        return self.b.device

    @property
    def mT(self) -> LowRank:  # noqa: N802  the name torch gives it
        return LowRank(self.a.mT, self.b.mT)

    def __getitem__(self, number: int) -> LowRank:
        """One matrix of a stack."""
        return LowRank(self.b[number], self.a[number])

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.b * factor, self.a)


Delta = Tensor | LowRank


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """The sum of products as one product: ranks add up."""
    return LowRank(torch.cat([part.b for part in parts], -1), torch.cat([part.a for part in parts], -2))


def add_to(total: Tensor, delta: Delta, factor: float = 1.0) -> None:
    """``total += factor * delta``, in place."""
    if isinstance(delta, LowRank):
        if total.ndim == 2:
            total.addmm_(delta.b, delta.a, alpha=factor)
        else:
            total.baddbmm_(delta.b, delta.a, alpha=factor)
    else:
        total.add_(delta, alpha=factor)


def square(delta: Delta) -> float:
    """The squared Frobenius norm of a matrix, in float64."""
    if isinstance(delta, LowRank):
        b, a = delta.b.double(), delta.a.double()
        return max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))
    return float(delta.double().square().sum())


def blocks(delta: Delta) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, rows)`` of a matrix, at most ``BLOCK`` entries (or one row) at a time."""
    rows, columns = delta.shape
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        if isinstance(delta, LowRank):
            yield start, stop, delta.b[start:stop] @ delta.a
        else:
            yield start, stop, delta[start:stop]


def total(deltas: Sequence[Delta]) -> Delta:
    """The sum of matrices, each indexed once: of factors alone, and no more of them than pay, factors again."""
    parts: list[LowRank] = []
    dense: Tensor | None = None
    for index in range(len(deltas)):
        delta = deltas[index]
        small = isinstance(delta, LowRank) and delta.rank + sum(p.rank for p in parts) <= min(delta.shape)
        if dense is None and small and isinstance(delta, LowRank):
            parts.append(delta)
            continue
        if dense is None:
            dense = torch.zeros(delta.shape, dtype=delta.dtype, device=delta.device)
            for part in parts:
                add_to(dense, part)
        add_to(dense, delta)
    return stacked(parts) if dense is None else dense
