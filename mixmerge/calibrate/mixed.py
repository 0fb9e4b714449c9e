"""A model whose parameters hold merged weights: made from coefficients, and their gradients by inner products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixmerge.calibrate.coefficients import Layout
from mixmerge.calibrate.deltas import PIECE, Deltas
from mixmerge.methods.coefficients import bounds

if TYPE_CHECKING:
    from torch import Tensor


def _blocks(rows: Tensor, table: Tensor) -> Iterator[Tensor]:
    """Row numbers in blocks that hold no more elements than a piece."""
    length = max(1, PIECE // max(1, table.shape[1]))
    for start in range(0, len(rows), length):
        yield rows[start : start + length]


@contextmanager
def watching(
    parameters: Mapping[str, Tensor], learned: Collection[str], add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While in it, only what is learned has gradients, and each is handed to ``add`` and freed as it comes."""
    handles = []

    def taking(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            if gradient is not None:
                add(name, gradient)

        return take

    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learned and parameter.is_floating_point())
        if name in learned:
            handles.append(parameter.register_post_accumulate_grad_hook(taking(name)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


@dataclass
class Mixed:
    """Parameters of a model that hold the merged weights, and the inner products of their gradients.

    Args:
        parameters: by the names of the deltas; those that are not learned may be buffers.
        deltas: of the experts.
        layout: of the free coefficients.
        used_rows: by tensor, the only rows of a table that the data look up: the others are left as they are.
    """

    parameters: Mapping[str, Tensor]
    deltas: Deltas
    layout: Layout
    used_rows: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        import torch

        rows = len(self.layout.start)
        self.gradient = torch.zeros(rows, self.deltas.experts, dtype=torch.float64)

    def watched(self) -> AbstractContextManager[None]:
        """While in it, only what is learned has gradients, and each is taken in and freed as it comes."""
        return watching(self.parameters, self.layout.rows, self._add)

    def _add(self, name: str, gradient: Tensor) -> None:
        rows, used = self.layout.rows[name], self.used_rows.get(name)
        if used is not None and len(rows) == 1:
            for block in _blocks(used, gradient):
                _, delta = self.deltas.read_rows(name, block)
                wanted = gradient[block.to(gradient.device)].float().reshape(-1)
                products = delta.reshape(len(delta), -1).to(wanted.device) @ wanted
                self.gradient[rows[0]] += products.double().cpu()
            return
        flat = gradient.reshape(-1)
        for row, (first, last) in zip(rows, bounds(flat.numel(), len(rows)), strict=True):
            self.gradient[row] += self.deltas.products(name, first, flat[first:last])

    def build(self, values: Tensor, *, everything: bool = False) -> None:
        """Put the merged weights into the parameters.

        Args:
            values: coefficients (R, T), in the order of the layout.
            everything: also the tensors and rows that no step changes.
        """
        import torch

        with torch.no_grad():
            for name, rows in self.layout.rows.items():
                used = None if everything else self.used_rows.get(name)
                self._build(name, values[list(rows)].float(), used)
            for name, fixed in self.layout.fixed.items() if everything else ():
                self._build(name, torch.tensor([fixed], dtype=torch.float32), None)

    def _build(self, name: str, coefficients: Tensor, used: Tensor | None) -> None:
        target = self.parameters[name]
        if used is not None and len(coefficients) == 1:
            for block in _blocks(used, target):
                base, delta = self.deltas.read_rows(name, block)
                mixed = coefficients[0] @ delta.reshape(len(delta), -1)
                target.data[block.to(target.device)] = (base + mixed.reshape(base.shape)).to(target)
            return
        # A parameter that is no contiguous block cannot be written through a view of it.
        whole = target.data if target.is_contiguous() else target.data.contiguous()
        flat = whole.view(-1)
        for row, (first, last) in zip(coefficients, bounds(flat.numel(), len(coefficients)), strict=True):
            self.deltas.mix(name, first, row, flat[first:last])
        if whole is not target.data:
            target.data.copy_(whole)
