"""MagMax: of each entry, the largest change any expert made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.methods.average import scalar


def magmax(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[float | Tensor] | None = None,
    lambda_: float | Tensor = 0.5,
) -> Tensor:
    """``base + lambda * w_k * delta_k``, entry by entry with the expert k whose delta is largest in magnitude.

    Source: MagMax (arXiv:2407.06322), maximum magnitude selection. Among equal magnitudes the later expert wins, and
    lambda is 0.5, as in the authors' release.

    Args:
        deltas: ``S`` each; each is asked for once, so that two are in memory, however many there are.
        base: ``S``.
        weight: one finite number per delta, on what is taken from it; all 1 if not given. Which expert is taken does
            not depend on them.
        lambda_: factor on the merged delta.

    Returns:
        ``S``. Gradients flow to the deltas where they were taken.

    Deviations:
        the paper has no weights. It means experts that were trained one after another; so does nothing here.
    """
    weights = [1.0] * len(deltas) if weight is None else weight
    size, taken = torch.zeros_like(base), torch.zeros_like(base)
    for at, number in enumerate(weights):
        delta = deltas[at]
        larger = delta.detach().abs() >= size
        size = torch.where(larger, delta.detach().abs(), size)
        taken = torch.where(larger, scalar(number, base).to(base.dtype) * delta, taken)
    return base + scalar(lambda_, base).to(base.dtype) * taken
