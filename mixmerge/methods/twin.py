"""Twin-Merging for given weights of the experts: the plain definition, which a bank at work is tested against.

Legend: E experts, a tensor of shape ``S``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.methods.records import Role


def twin(
    experts: Sequence[Tensor],
    *,
    shared: Tensor,
    weight: Sequence[float] | Tensor,
    rank: int | None = None,
    energy: float | None = None,
    role: Role = "linear",
) -> Tensor:
    """``shared + sum_e weight_e * SVD_r(experts_e - shared)``; whole differences of what is no matrix.

    Source: Twin-Merging, arXiv:2406.15479, sections 4.2 and 4.3. The paper's shared part is task arithmetic, its
    weights are a softmax over what its router says of an input.

    Args:
        experts: E tensors ``S``.
        shared: ``S``, the merged tensor as it is stored.
        weight: E numbers.
        rank: singular triplets kept of a matrix, 1 or more; None with ``energy`` None keeps all.
        energy: the fewest triplets that keep this share of the squared norm, above 0, at most 1.
        role: of the tensor; nothing but matrices and tables is truncated.
    """
    merged = shared.float().clone()
    for expert, factor in zip(experts, weight, strict=True):
        part = expert.float() - shared.float()
        if part.ndim == 2 and role != "other":
            part = _truncated(part, rank, energy)
        merged += float(factor) * part
    return merged


def _truncated(part: Tensor, rank: int | None, energy: float | None) -> Tensor:
    u, s, vh = torch.linalg.svd(part.double(), full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        shares = s.square().cumsum(0)
        kept = min(kept, int((shares < energy * shares[-1]).sum()) + 1)
    product: Tensor = (u[:, :kept] * s[:kept]) @ vh[:kept]
    return product.to(part.dtype)
