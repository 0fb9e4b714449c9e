"""Three ways to add a mixture's change to a site's output; all give what ``mix.change`` defines.

Each is a pair of linear maps, ``shrink`` to the ranks and ``expand`` to the outputs, with the weights between them.
The factors are frozen: gradients go to weights and inputs only, through the same maps the other way round. What is
kept for them is what lies between, of the size of the ranks. None makes a tensor of (tokens x experts x width).

Source: the layouts of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285), with weights and several experts a
token.

Legend as in ``picks``; n = B * T tokens, t tokens of a unit (T where units are rows, else 1), r largest rank of a site,
Q ranks that ``concat`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixmerge.bank.costs import Executor
from mixmerge.bank.paths import Concat, Gather, Path
from mixmerge.bank.segmented import Segmented

PATHS: dict[Executor, type[Path]] = {"concat": Concat, "segmented": Segmented, "gather": Gather}


class _Shrink(torch.autograd.Function):
    """``Path.shrink``, whose gradient is ``shrink_back``; it keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return path.shrink(u)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, None]:
        wanted = ctx.needs_input_grad[0]
        return ctx.path.shrink_back(dz.contiguous()) if wanted else None, None


class _Expand(torch.autograd.Function):
    """``y`` and ``Path.expand``, whose gradient is ``expand_back``; it keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, path: Path) -> Tensor:
        ctx.path = path
        total = y.clone()
        path.expand(z, total)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        wanted = ctx.needs_input_grad[0]
        return ctx.path.expand_back(dy.contiguous()) if wanted else None, dy, None


def added(path: Path, u: Tensor, y: Tensor) -> Tensor:
    """``y`` and the change: with gradients to ``u``, ``y`` and the weights.

    Args:
        path: of the site and decision.
        u: ``(n, d)``, or ``(n,)`` tokens.
        y: ``(n, o)``, in the type of the factors.
    """
    shrink: Callable[[Tensor, Path], Tensor] = _Shrink.apply
    expand: Callable[[Tensor, Tensor, Path], Tensor] = _Expand.apply
    z = shrink(u, path) if path.site.kind == "linear" else path.shrink(u)
    return expand(path.between(z), y, path)
