"""One delta for all tasks, and of each task the entries it keeps, as bits: what EMR-Merging and TALL masks store.

Legend: S shape of a tensor, n its entries, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

UNIFIED, ELECTED, BITS, FACTORS = "unified", "elected", "bits", "factors"


@dataclass(frozen=True, eq=False)
class MaskedTensor:
    """One tensor of all tasks.

    Args:
        delta: ``S``: the unified delta; or, if ``elected``, the values that it leads to from the base.
        bits: ``(T, ceil(n / 8))`` uint8: of each task the entries it keeps, the first in the lowest bit.
        factors: ``(T,)``: of each task, on what it keeps; in the dtype that is computed in.
        elected: see ``delta``.
    """

    delta: Tensor
    bits: Tensor
    factors: Tensor
    elected: bool = False

    @classmethod
    def of(
        cls,
        unified: Tensor,
        keep: Callable[[int], Tensor],
        factors: Tensor,
        *,
        base: Tensor,
        stored: torch.dtype,
    ) -> Self:
        """Packed as small as loses nothing.

        Args:
            unified: ``S``.
            keep: of a task, ``S`` of bools.
            factors: ``(T,)``.
            base: ``S``, in the dtype of ``unified``.
            stored: dtype of the base's file. A unified delta takes entries of experts as they are; of experts in
                this dtype it is kept as those entries themselves, which are half as wide.
        """
        rows = [
            np.packbits(keep(at).cpu().numpy().reshape(-1), bitorder="little") for at in range(len(factors))
        ]
        bits, factors = torch.from_numpy(np.stack(rows)), factors.cpu().contiguous()  # (T, ceil(n / 8)), (T,)
        if stored.itemsize < unified.dtype.itemsize:
            values = (base + unified).to(stored)
            if _same_bits(_difference(values.to(base.dtype), base), unified):
                return cls(values.cpu().contiguous(), bits, factors, elected=True)
        return cls(unified.cpu().contiguous(), bits, factors)

    def of_task(self, base: Tensor, task: int) -> Tensor:
        """The tensor of a task's model, ``S``, in the base's dtype: ``base + factor * unified`` where the mask says so.

        Source: EMR-Merging (arXiv:2405.17461), the merging procedure; TALL masks (arXiv:2405.07813).

        Args:
            base: ``S``, as it is stored.
            task: position.
        """
        work = self.factors.dtype
        wide, one = base.to(work), self.delta.to(work)
        if self.elected:
            one = _difference(one, wide)
        flags = np.unpackbits(self.bits[task].numpy(), count=math.prod(base.shape), bitorder="little")
        keep = torch.from_numpy(flags).view(torch.bool).reshape(base.shape)
        kept = torch.where(keep, one, torch.zeros_like(one))
        return (wide + self.factors[task] * kept).to(base.dtype)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As they are called in a file."""
        delta = ELECTED if self.elected else UNIFIED
        return {f"{delta}/{name}": self.delta, f"{BITS}/{name}": self.bits, f"{FACTORS}/{name}": self.factors}


def names_in(tensors: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Of what masked tensors a file has."""
    return [name.removeprefix(f"{BITS}/") for name in tensors if name.startswith(f"{BITS}/")]


def _difference(values: Tensor, base: Tensor) -> Tensor:
    """``values - base``, whose zeros are negative as EMR's are."""
    found = values - base
    return torch.where(found == 0, -torch.zeros_like(found), found)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))
