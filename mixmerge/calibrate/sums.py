"""Sums in the making: squares of gradients, and products of the inputs of linear maps.

Shapes: n is the number of inputs of a linear map, S the shape of a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixmerge.calibrate.anatomy import Shown

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 8192  # tokens whose products are added in float32 before the sum in float64 takes them
_TOGETHER = 1024  # inputs wait for as many: a sum of n x n numbers is read and written for each product


@dataclass
class Sums:
    """Sums in the making."""

    wanted: Collection[str] | None
    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[Tensor]] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def add_square(self, name: str, gradient: Tensor, factor: float) -> None:
        """Add ``factor * gradient**2``."""
        moved = gradient.float().cpu()
        self._begun(name, moved.shape).addcmul_(moved, moved, value=factor)

    def add_rows(
        self, name: str, shape: Sequence[int], rows: Tensor, gradient: Tensor, factor: float
    ) -> None:
        """``add_square`` of a table ``shape`` that has a gradient ``(U, d)`` in these rows ``(U,)`` alone."""
        squares = gradient.square().mul_(factor).cpu()
        self._begun(name, shape).index_add_(0, rows.cpu(), squares)

    def _begun(self, name: str, shape: Sequence[int]) -> Tensor:
        """The sum of a tensor of this shape, in float32: zeros at first."""
        import torch

        if name not in self.values:
            self.add(name, torch.zeros(tuple(shape), dtype=torch.float32), 0)
        return self.values[name]

    def add_inputs(self, name: str, inputs: Tensor, power: int) -> None:
        """Count inputs (tokens, n) of a linear map; of x xᵀ (``power`` 2) they wait for the next product."""
        count, width = inputs.shape
        if power == 1:
            self.add(name, inputs.double().square().sum(0).cpu(), count)
            return
        self.counts[name] = self.counts.get(name, 0) + count
        waiting = self.waiting.setdefault(name, [])
        waiting.append(inputs)
        if sum(map(len, waiting)) >= _waits(width):
            self.multiply(name)

    def multiply(self, name: str) -> None:
        """Add the products of what waits."""
        import torch

        waiting = self.waiting.pop(name, None)
        if not waiting:
            return
        width = waiting[0].shape[-1]
        if name not in self.values:
            self.values[name] = torch.zeros((width, width), dtype=torch.float64)
        for piece in torch.split(torch.cat(waiting), _PIECE):
            part = piece if piece.dtype == torch.float64 else piece.float()
            self.values[name] += (part.T @ part).cpu()

    def drop(self, name: str) -> None:
        """Forget a tensor."""
        for kept in (self.values, self.counts, self.same, self.waiting):
            kept.pop(name, None)

    def add(self, name: str, value: Tensor, count: int) -> None:
        if name in self.values:
            self.values[name] += value
        else:
            self.values[name] = value
        self.counts[name] = self.counts.get(name, 0) + count


def waiting_inputs(widths: Iterable[int], shown: Shown) -> int:
    """Bytes of the inputs of linear maps that wait for a product, at most; a batch may come on top."""
    return 4 * sum(width * (_waits(width) + shown.places) for width in widths)


def _waits(width: int) -> int:
    """Tokens that wait until a product is made: a quarter of the bytes of its sum, or ``_TOGETHER``."""
    return max(_TOGETHER, width // 2)
