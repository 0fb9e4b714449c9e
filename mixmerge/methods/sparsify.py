"""Which entries of a delta survive: four masks and the two ways to make up for what was dropped.

Order of entries everywhere: by magnitude, and among equal magnitudes the lower index counts as larger. So
"the largest k" is exactly k entries, whatever the ties. Masks are constants: no gradient flows into them, nor
into density, gamma or epsilon. Flat indices are row-major.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.kernels.philox import Draw, draws

RescaleBy = Literal["l1", "inverse_p"]
Scope = Literal["tensor", "model"]
TINY_L1 = 1e-7  # an L1 norm below this is not worth restoring


class Cut(NamedTuple):
    """A threshold that keeps an exact number of entries.

    An entry stays if its magnitude is above ``value``, or equal to it at a flat index below ``limit``.
    """

    value: float
    limit: int


NOTHING = Cut(float("inf"), 0)


def keep_count(density: float, elements: int) -> int:
    """``int(density * elements)``, but at least one entry of a density above 0, if there is any."""
    return min(elements, max(1, int(density * elements))) if density > 0 else 0


def cut_at(magnitudes: Tensor, count: int) -> Cut:
    """The cut that keeps exactly the ``count`` largest of ``(n,)`` magnitudes, the first among equals."""
    if count <= 0 or magnitudes.numel() == 0:
        return NOTHING
    value = torch.kthvalue(magnitudes, magnitudes.numel() - count + 1).values
    room = count - int((magnitudes > value).sum())  # how many of the entries equal to value still fit
    limit = int((magnitudes == value).nonzero()[room - 1]) + 1
    return Cut(float(value), limit)


def model_cuts(deltas: Mapping[str, Tensor], density: float) -> dict[str, Cut]:
    """One expert's cuts when its whole delta has one threshold, all tensors in sorted order of their names.

    Source: TIES-Merging (arXiv:2306.01708), algorithm 1, trim: over the flattened task vector.
    """
    names = sorted(deltas)
    flat = torch.cat([deltas[name].detach().abs().flatten() for name in names])  # (sum n,)
    value, limit = cut_at(flat, keep_count(density, flat.numel()))
    cuts, start = {}, 0
    for name in names:
        elements = deltas[name].numel()
        cuts[name] = Cut(value, min(max(limit - start, 0), elements))
        start += elements
    return cuts


def above(delta: Tensor, cut: tuple[float, int]) -> Tensor:
    """Mask of the entries a cut keeps: ``S`` to ``S``, bool."""
    value, limit = cut
    size = delta.detach().abs().flatten()  # (n,)
    index = torch.arange(size.numel(), device=size.device)
    return ((size > value) | ((size == value) & (index < limit))).reshape(delta.shape)


def largest(delta: Tensor, count: int) -> Tensor:
    """Mask of exactly the ``count`` largest entries: ``S`` to ``S``, bool."""
    return above(delta, cut_at(delta.detach().abs().flatten(), count))


def magnitude(delta: Tensor, density: float) -> Tensor:
    """Mask of the largest ``int(density * n)`` entries, at least one if density > 0.

    Source: TIES-Merging (arXiv:2306.01708), algorithm 1, trim; on one tensor.
    """
    return largest(delta, keep_count(density, delta.numel()))


def band(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Mask of the ``int(density * n)`` entries that come below the ``int(gamma * n)`` largest.

    At least one is kept if density > 0. If not enough are left below the largest, the smallest are kept.

    Source: Model Breadcrumbs (arXiv:2312.06795), the mask; counted from density as in mergekit.
    """
    elements = delta.numel()
    target = keep_count(density, elements)
    bottom = max(0, elements - target - int(gamma * elements))
    return largest(delta, elements - bottom) & ~largest(delta, elements - bottom - target)


def ranked(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Chance of every entry to be kept, growing with its rank in its row: ``S`` to ``S``, float64.

    A row runs over the last dimension; a vector is one row, a number a row of one. With ``eps`` the least of
    epsilon, density and 1 - density, the entry of ascending rank r among n is kept with chance
    ``(density - eps) + 2 * eps * r / (n - 1)``; an entry alone in its row with chance ``density``.

    Source: DELLA-Merging (arXiv:2406.11617), MagPrune.
    """
    length = delta.shape[-1] if delta.ndim else 1
    if length <= 1 or delta.numel() == 0:
        return torch.full_like(delta, density, dtype=torch.float64, requires_grad=False)
    eps = min(epsilon, density, 1 - density)
    order = delta.detach().abs().sort(dim=-1, descending=True, stable=True).indices
    falling = torch.arange(length - 1, -1, -1, device=delta.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, falling)
    return (density - eps) + 2 * eps * rank.double() / (length - 1)


def sampled(delta: Tensor, p: float, *, draw: Draw, expert: int) -> Tensor:
    """Mask that keeps each entry with chance ``p``: where its 32-bit draw is below ``p * 2**32``.

    Args:
        delta: gives shape and device only.
        p: 0 to 1.
        draw: seed and tensor name the draws are a function of.
        expert: position of the expert among the deltas, 0 to 65535.
    """
    return _words(delta, draw, expert) < p * 2.0**32


def sampled_by_rank(delta: Tensor, density: float, epsilon: float, *, draw: Draw, expert: int) -> Tensor:
    """Mask that keeps each entry with its chance in ``ranked``, found without ranks.

    A 32-bit draw below ``2**32 * (density - eps)`` keeps the entry and one of at least ``2**32 * (density + eps)``
    drops it, whatever its rank. Where a draw falls between them picks one of the n - 1 others in the row, each as
    often, and the entry is kept if it comes after that one: as r others come before it, with chance r / (n - 1).

    Source: DELLA-Merging (arXiv:2406.11617), MagPrune.

    Args:
        delta: ``S``; a row runs over its last dimension.
        density, epsilon: 0 to 1.
        draw, expert: as ``sampled``.
    """
    length, eps = delta.shape[-1] if delta.ndim else 1, min(epsilon, density, 1 - density)
    if length <= 1 or eps == 0 or delta.numel() == 0:
        return sampled(delta, density, draw=draw, expert=expert)
    low, high = (min(math.ceil(p * 2.0**32), 2**32) for p in (density - eps, density + eps))
    words, size = _words(delta, draw, expert), delta.detach().abs()
    share = (length - 1) / max(high - low, 1)
    index = torch.arange(length, device=delta.device)  # (n,)
    rival = ((words - low).clamp(0, max(high - low - 1, 0)) * share).long()
    rival = rival + (rival >= index)
    other = size.gather(-1, rival)
    after = (other < size) | ((other == size) & (rival > index))
    return (words < low) | ((words < high) & after)


def _words(delta: Tensor, draw: Draw, expert: int) -> Tensor:
    """The draws of a delta's entries: ``S``, whole numbers in float64."""
    words = draws(draw, expert=expert, start=0, stop=delta.numel())
    return words.to(delta.device).reshape(delta.shape).double()


def survivors(
    delta: Tensor, mask: Tensor, *, rescale_by: RescaleBy | None = None, p: float | Tensor = 1.0
) -> Tensor:
    """The delta with dropped entries at 0, scaled up to make up for them.

    Args:
        delta, mask: ``S`` each.
        rescale_by: ``l1`` gives the tensor its L1 norm back: times L1(delta) / L1(kept), both summed in
            float64 (times 1 if either is below 1e-7). ``inverse_p`` keeps each entry's expectation: times
            1 / p. None leaves the survivors as they are. The factor is rounded to the delta's dtype first.
        p: the chances the mask was drawn with, for ``inverse_p``.

    Raises:
        MethodError: any other rescale_by.
    """
    kept = torch.where(mask, delta, 0.0)
    if rescale_by is None:
        return kept
    if rescale_by == "inverse_p":
        chance = torch.as_tensor(p, dtype=torch.float64, device=delta.device)
        return kept * torch.where(mask, 1 / chance, 1.0).to(delta.dtype)
    if rescale_by != "l1":
        raise MethodError(Fault("rescale_by", f"is {rescale_by!r}", "Known: inverse_p, l1"))
    before, after = (x.abs().sum(dtype=torch.float64) for x in (delta, kept))
    usable = (before >= TINY_L1) & (after >= TINY_L1)
    factor = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)
    return kept * factor.to(delta.dtype)


def largest_entries(
    deltas: Sequence[Tensor],
    *,
    density: Sequence[float] | None,
    scope: Scope,
    cuts: Sequence[tuple[float, int]] | None,
) -> list[Tensor]:
    """Masks of the largest magnitudes of each delta: T of ``S``.

    Args:
        deltas: of one tensor, ``S`` each.
        density: share kept of each; None keeps all.
        scope: of each tensor; or, with ``model``, obey ``cuts``.
        cuts: what ``model_cuts`` found for each delta.

    Raises:
        MethodError: ``scope="model"`` without cuts.
    """
    if scope == "tensor":
        shares = [1.0] * len(deltas) if density is None else density
        return [magnitude(delta, share) for delta, share in zip(deltas, shares, strict=True)]
    if cuts is None:
        raise MethodError(
            Fault("scope", "scope: model needs the threshold of each expert's whole delta", run="pass cuts")
        )
    return [above(delta, cut) for delta, cut in zip(deltas, cuts, strict=True)]
