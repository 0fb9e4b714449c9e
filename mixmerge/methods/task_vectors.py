"""Methods on deltas: each name is a sparsifier (none, magnitude, random, band, ranked) and a consensus
(weighted sum, or sum after sign election).

All take the T deltas (expert - base) of one tensor in recipe order, the base, and per-expert numbers aligned
with the deltas, and return ``base + lambda * merged``. Shapes: deltas, base and result ``S``. Computed in the
deltas' dtype (float32 from the engine), gradients flowing to deltas, base, weight and lambda.

The arithmetic, which a fused kernel repeats step by step: sparsified s_i; d_i = w_i * s_i; sums start at 0
and add expert 0 first; weights, lambda and rescale factors are rounded to float32 before they touch a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mixmerge.kernels.philox import Draw
from mixmerge.methods.average import ZERO_SUM, scalar
from mixmerge.methods.sparsify import (
    RescaleBy,
    Scope,
    band,
    largest_entries,
    ranked,
    sampled_by_rank,
    survivors,
)

Number = float | Tensor
Agg = Literal["mean", "sum"] | None


def consensus(
    kept: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    elect: bool,
    normalize: bool,
    lambda_: Number,
) -> Tensor:
    """The core of the family: ``base + lambda * combine(w_i * s_i)``.

    Without election the combination is ``sum_i d_i``, normalized by ``sum_i w_i`` (summed in float64; below
    1e-8 it is not divided). With election each entry takes the sign of ``sum_i d_i`` (+ where that is 0),
    only experts whose ``d_i`` has that sign take part, and normalizing divides by the sum of their weights (1
    where that is 0); an exact zero never takes part.

    Args:
        kept: sparsified deltas s_i.
        weight: one finite number per delta, of any sign.
        elect: elect signs.
        normalize: divide by the weights that took part.
        lambda_: factor on the merged delta.
    """
    coefficients = [scalar(w, base) for w in weight]
    rounded = [coefficient.to(base.dtype) for coefficient in coefficients]
    scaled = [w * s for w, s in zip(rounded, kept, strict=True)]
    merged = torch.zeros_like(base)
    for d in scaled:
        merged = merged + d
    if elect:
        sign = torch.where(merged >= 0, 1.0, -1.0)
        merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
        for w, d in zip(rounded, scaled, strict=True):
            agrees = torch.sign(d) == sign
            merged = merged + torch.where(agrees, d, 0.0)
            divisor = divisor + torch.where(agrees, w, 0.0)
        divisor = torch.where(divisor == 0, 1.0, divisor)
    else:
        divisor = torch.zeros_like(scalar(0.0, base))
        for coefficient in coefficients:
            divisor = divisor + coefficient
        divisor = torch.where(divisor.abs() < ZERO_SUM, 1.0, divisor).to(base.dtype)
    if normalize:
        merged = merged / divisor
    return base + scalar(lambda_, base).to(base.dtype) * merged


def _averages(agg: Agg, normalize: bool) -> bool:
    """``agg`` says the same as ``normalize`` in the papers' words, and wins where both are given."""
    return normalize if agg is None else agg == "mean"


def _drop(
    deltas: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float] | None,
    draw: Draw,
    rescale: bool,
    rescale_by: RescaleBy,
) -> list[Tensor]:
    """Deltas whose entries were kept with one chance, or with DELLA's."""
    by, kept = rescale_by if rescale else None, []
    for i, (delta, share) in enumerate(zip(deltas, density, strict=True)):
        eps = epsilon[i] if epsilon is not None else 0.0
        mask = sampled_by_rank(delta, share, eps, draw=draw, expert=i)
        p = ranked(delta, share, eps) if by == "inverse_p" and eps else share
        kept.append(survivors(delta, mask, rescale_by=by, p=p))
    return kept


def _crumbs(
    deltas: Sequence[Tensor], density: Sequence[float], gamma: Sequence[float], rescale: bool
) -> list[Tensor]:
    """Deltas without their largest and smallest entries."""
    by: RescaleBy | None = "l1" if rescale else None
    rows = zip(deltas, density, gamma, strict=True)
    return [survivors(delta, band(delta, keep, top), rescale_by=by) for delta, keep, top in rows]


def task_arithmetic(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    normalize: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """Base plus a weighted sum of deltas: ``base + lambda * sum_i w_i * delta_i``.

    Source: Editing Models with Task Arithmetic (arXiv:2212.04089), section 2.

    Args:
        deltas, base: one tensor group.
        weight: one finite number per delta.
        normalize: divide the sum by the sum of the weights.
        lambda_: the paper's scaling term.

    Deviations:
        the paper has no weights (all 1) and no normalizing; a zero sum of weights is not divided by.
    """
    return consensus(deltas, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def ties(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float] | None = None,
    scope: Scope = "tensor",
    normalize: bool = True,
    agg: Agg = None,
    rescale: bool = False,
    lambda_: Number = 1.0,
    cuts: Sequence[tuple[float, int]] | None = None,
) -> Tensor:
    """Trim each delta to its largest entries, elect a sign per entry, average the deltas that have it.

    Source: TIES-Merging (arXiv:2306.01708), algorithm 1.

    Args:
        deltas, base: one tensor group.
        weight: one finite number per delta; the paper's method has 1.
        density: share kept of each delta, 0 to 1; the paper's k, 0.2 there. None keeps all.
        scope: ``tensor`` keeps exactly ``int(density * n)`` of this tensor; ``model`` obeys ``cuts``.
        normalize: divide by the agreeing weights (the paper's disjoint mean).
        agg: ``mean`` or ``sum``: ``normalize`` by another name.
        rescale: scale what is kept back to the delta's L1 norm.
        lambda_: the paper's scaling term.
        cuts: with ``scope="model"``, per delta the threshold of that expert's whole delta: keep where
            magnitude > value, or == value at a flat index < limit (``sparsify.model_cuts``).

    Raises:
        MethodError: ``scope="model"`` without cuts.

    Deviations:
        the paper trims over the whole task vector (``scope="model"``), keeps every entry tied at the
        threshold, elects on unweighted deltas, and gives an entry whose sum is 0 the sign of the majority;
        here and in mergekit exactly k are kept, weights count, and a sum of 0 is positive.
    """
    masks = largest_entries(deltas, density=density, scope=scope, cuts=cuts)
    by: RescaleBy | None = "l1" if rescale else None
    kept = [survivors(delta, mask, rescale_by=by) for delta, mask in zip(deltas, masks, strict=True)]
    return consensus(
        kept, base=base, weight=weight, elect=True, normalize=_averages(agg, normalize), lambda_=lambda_
    )


def dare_linear(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    draw: Draw,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "l1",
    lambda_: Number = 1.0,
) -> Tensor:
    """Drop entries of each delta at random, rescale the rest, then task arithmetic.

    Source: Language Models are Super Mario (arXiv:2311.03099), drop and rescale; its 1 - p is our density.

    Args:
        deltas, base: one tensor group.
        weight: one finite number per delta.
        density: chance of an entry to be kept, 0 to 1.
        draw: seed and tensor name; expert i draws with its position in ``deltas``.
        normalize: divide the sum by the sum of the weights.
        rescale: make up for what was dropped.
        rescale_by: ``l1`` (mergekit) or ``inverse_p`` (the paper: times 1 / density).
        lambda_: factor on the merged delta.

    Raises:
        MethodError: unknown rescale_by.

    Deviations:
        by default the tensor's L1 norm is restored, as in mergekit, not each entry's expectation. Masks come
        from Philox counters, so no mask equals one of mergekit's.
    """
    kept = _drop(deltas, density, None, draw, rescale, rescale_by)
    return consensus(kept, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def dare_ties(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    draw: Draw,
    normalize: bool = False,
    agg: Agg = None,
    rescale: bool = True,
    rescale_by: RescaleBy = "l1",
    lambda_: Number = 1.0,
) -> Tensor:
    """Drop entries of each delta at random, rescale the rest, then elect signs as TIES does.

    Source: Language Models are Super Mario (arXiv:2311.03099), drop and rescale, with the election and
    disjoint merge of TIES-Merging (arXiv:2306.01708), algorithm 1.

    Args: as ``dare_linear``, and
        normalize: divide by the agreeing weights.
        agg: ``mean`` or ``sum``: ``normalize`` by another name.

    Raises:
        MethodError: unknown rescale_by.

    Deviations:
        as ``dare_linear``; and as in mergekit there is no trim by magnitude after the random drop, and the
        default is the sum, where the papers take the mean (``agg="mean"``).
    """
    kept = _drop(deltas, density, None, draw, rescale, rescale_by)
    return consensus(
        kept, base=base, weight=weight, elect=True, normalize=_averages(agg, normalize), lambda_=lambda_
    )


def breadcrumbs(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    rescale: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """Drop the largest and the smallest entries of each delta, then task arithmetic.

    Source: Model Breadcrumbs (arXiv:2312.06795), masks and merge.

    Args:
        deltas, base: one tensor group.
        weight: one finite number per delta.
        density: share of entries kept, 0 to 1: 1 - beta - gamma in shares of the paper's two tails.
        gamma: share of the largest entries dropped, 0 to 1; gives way if density leaves no room for it.
        normalize: divide the sum by the sum of the weights.
        rescale: scale what is kept back to the delta's L1 norm.
        lambda_: the paper's alpha.

    Deviations:
        the paper names both tails, mergekit and this density and the upper one; at least one entry is kept
        when density > 0, however small the tensor.
    """
    kept = _crumbs(deltas, density, gamma, rescale)
    return consensus(kept, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def breadcrumbs_ties(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    agg: Agg = None,
    rescale: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """Drop the largest and the smallest entries of each delta, then elect signs as TIES does.

    Source: Model Breadcrumbs (arXiv:2312.06795), the masks, with the election and disjoint merge of
    TIES-Merging (arXiv:2306.01708), algorithm 1.

    Args: as ``breadcrumbs``, and
        normalize: divide by the agreeing weights.
        agg: ``mean`` or ``sum``: ``normalize`` by another name.

    Deviations:
        as ``breadcrumbs``; the default is mergekit's sum, not the mean of the agreeing.
    """
    kept = _crumbs(deltas, density, gamma, rescale)
    return consensus(
        kept, base=base, weight=weight, elect=True, normalize=_averages(agg, normalize), lambda_=lambda_
    )


def della(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    epsilon: Sequence[float],
    draw: Draw,
    normalize: bool = True,
    agg: Agg = None,
    rescale: bool = True,
    rescale_by: RescaleBy = "l1",
    lambda_: Number = 1.0,
) -> Tensor:
    """Drop entries at random, small ones more often, rescale the rest, then elect signs as TIES does.

    Source: DELLA-Merging (arXiv:2406.11617), MagPrune, elect, fuse.

    Args: as ``della_linear``, and
        normalize: divide by the agreeing weights (the paper's mean).
        agg: ``mean`` or ``sum``: ``normalize`` by another name.

    Raises:
        MethodError: unknown rescale_by.

    Deviations:
        as ``della_linear``; elects on weighted deltas, a sum of 0 being positive.
    """
    kept = _drop(deltas, density, epsilon, draw, rescale, rescale_by)
    return consensus(
        kept, base=base, weight=weight, elect=True, normalize=_averages(agg, normalize), lambda_=lambda_
    )


def della_linear(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    epsilon: Sequence[float],
    draw: Draw,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "l1",
    lambda_: Number = 1.0,
) -> Tensor:
    """Drop entries at random, small ones more often, rescale the rest, then task arithmetic.

    Source: DELLA-Merging (arXiv:2406.11617), MagPrune.

    Args:
        deltas, base: one tensor group.
        weight: one finite number per delta.
        density: mean chance of an entry to be kept, 0 to 1; 1 - p in the paper.
        epsilon: half width of the chances within a row, 0 to 1; shrinks to density or 1 - density.
        draw: seed and tensor name; expert i draws with its position in ``deltas``.
        normalize: divide the sum by the sum of the weights.
        rescale: make up for what was dropped.
        rescale_by: ``l1`` (mergekit: one factor per tensor) or ``inverse_p`` (the paper: each entry by its
            own chance).
        lambda_: factor on the merged delta.

    Raises:
        MethodError: unknown rescale_by.

    Deviations:
        a wide epsilon shrinks where mergekit refuses it; rows of one entry are kept with chance density; rows
        are the last dimension of any tensor.
    """
    kept = _drop(deltas, density, epsilon, draw, rescale, rescale_by)
    return consensus(kept, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)
