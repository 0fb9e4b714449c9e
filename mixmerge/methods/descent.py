"""Adam on one tensor, by a gradient in closed form: no graph, and no fresh memory from step to step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def descend(
    start: Tensor,
    gradient: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    lr: float,
    settle: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Adam (betas 0.9 and 0.999, epsilon 1e-8) from ``start``, which is overwritten.

    Args:
        start: ``(m, n)``.
        gradient: of a point, written to the buffer it is given second and returned.
        steps: how many, 0 or more.
        lr: the step size.
        settle: called with the point after each step, to change it in place.
    """
    point, slope = start.contiguous(), torch.empty_like(start, memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam([point], lr=lr, fused=True)
    for _ in range(steps):
        point.grad = gradient(point, slope)
        optimizer.step()
        if settle is not None:
            settle(point)
    point.grad = None
    return point
