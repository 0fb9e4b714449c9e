"""Methods that combine the experts' own weights: average, spherical interpolation, copy.

All tensors of one call are one group: the same tensor of every model, all of one shape. They come in
float32 (float64 stays float64) and the result has their dtype. Scalars are computed in float64 and rounded to
the tensors' dtype before they touch one; sums run in recipe order, so a fused kernel can match bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError

ZERO_SUM = 1e-8  # a sum of weights below this is no divisor
COLLINEAR = 0.9995  # above this |cosine| the arc is as good as straight, and its sine too small to divide by
ZERO_NORM = 1e-8


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a 0-D float64 tensor beside ``like``; gradients still reach a tensor that is given."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)


def linear(experts: Sequence[Tensor], *, weight: Sequence[float | Tensor], normalize: bool = True) -> Tensor:
    """Weighted average of the experts: ``sum_i f_i * x_i`` with ``f_i = w_i / sum(w)``, or ``f_i = w_i``.

    ``f_i`` is computed in float64 and rounded once; the sum starts at 0 and adds expert 0 first.

    Source: Model soups (arXiv:2203.05482), the uniform soup; with weights as in mergekit's ``linear``.

    Args:
        experts: at least one tensor.
        weight: one finite number per expert, of any sign.
        normalize: divide by the sum of the weights.

    Shapes:
        experts ``S`` each, result ``S``; weights are numbers or 0-D tensors.

    Raises:
        MethodError: the weights sum to 0 (below 1e-8) and are to be normalized.

    Deviations:
        mergekit sums first and divides afterwards (the last bit may differ) and writes NaN on a zero sum.
    """
    factors = [scalar(value, experts[0]) for value in weight]
    if normalize:
        total = torch.zeros_like(factors[0])
        for factor in factors:
            total = total + factor
        if total.abs() < ZERO_SUM:
            raise MethodError(
                Fault(
                    "weight",
                    "the weights sum to 0 and normalize divides by their sum",
                    "normalize: false takes weights of any sum",
                    "change a weight or set normalize: false",
                )
            )
        factors = [factor / total for factor in factors]
    merged = torch.zeros_like(experts[0])
    for expert, factor in zip(experts, factors, strict=True):
        merged = merged + factor.to(expert.dtype) * expert
    return merged


def slerp(experts: Sequence[Tensor], *, base: Tensor, t: float | Tensor) -> Tensor:
    """Spherical interpolation from base (``t = 0``) to the one expert (``t = 1``), each tensor one vector.

    ``(sin((1 - t) * angle) * base + sin(t * angle) * expert) / sin(angle)`` with the angle between the two in
    float64; a straight line where ``|cos(angle)| > 0.9995``. Norms up to 1e-8 are taken as 1.

    Source: Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985), slerp; on weights as in
    mergekit's ``slerp``.

    Args:
        experts: exactly one tensor.
        base: where ``t = 0`` is.
        t: any number; outside 0 to 1 it goes on along the arc.

    Shapes:
        expert and base ``S``, result ``S``; t is a number or a 0-D tensor.

    Raises:
        ValueError: not exactly one expert.

    Deviations:
        mergekit takes norms and the dot product in float32.
    """
    (expert,) = experts
    position = scalar(t, base)
    a, b = base.double().flatten(), expert.double().flatten()  # (n,)
    norms = [torch.linalg.vector_norm(x) for x in (a, b)]
    lengths = [torch.where(norm > ZERO_NORM, norm, 1.0) for norm in norms]
    cosine = (a * b).sum() / (lengths[0] * lengths[1])
    if cosine.abs() > COLLINEAR:
        of_base, of_expert = 1 - position, position
    else:
        angle = torch.acos(cosine)
        of_base = torch.sin((1 - position) * angle) / torch.sin(angle)
        of_expert = torch.sin(position * angle) / torch.sin(angle)
    return of_base.to(base.dtype) * base + of_expert.to(base.dtype) * expert


def passthrough(experts: Sequence[Tensor], *, scale: Sequence[float | Tensor | None] | None = None) -> Tensor:
    """The one expert, copied, or times its scale.

    Source: mergekit's ``passthrough``; no paper.

    Args:
        experts: exactly one tensor.
        scale: one finite number, or None for a plain copy.

    Shapes:
        expert ``S``, result ``S``, never sharing memory with the expert.

    Raises:
        ValueError: not exactly one expert.
    """
    (expert,) = experts
    factor = scale[0] if scale else None
    return expert.clone() if factor is None else scalar(factor, expert).to(expert.dtype) * expert
