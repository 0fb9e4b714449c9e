"""The deltas of all experts a piece at a time: what inner products and rebuilt weights are made of.

Shapes: a piece of n elements of the row-major tensor has a base (n,) and deltas (T, n), float32 on the CPU; rows of
a table a base (r, c) and deltas (T, r, c).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    from torch import Tensor

# Elements of a piece: the base, a few deltas and the gradient of one stay in a core's own cache.
PIECE = 1 << 17


class Deltas(Protocol):
    """Base and deltas of the tensors of one merge; only pieces are ever in memory.

    What ``read`` and ``read_rows`` give is valid until the next call of either.
    """

    @property
    def experts(self) -> int: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Elements ``start`` to ``stop`` of the base and of every delta."""
        ...

    def read_rows(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of these numbers of a tensor of two dimensions."""
        ...

    def products(self, name: str, start: int, gradient: Tensor) -> Tensor:
        """Inner products (T,), float64 on the CPU, of a gradient (n,) with every delta from ``start`` on."""
        ...

    def mix(self, name: str, start: int, coefficients: Tensor, out: Tensor) -> None:
        """Fill ``out`` (n,) with the base and coefficients (T,), float32 on the CPU, times deltas from ``start`` on."""
        ...


@dataclass(frozen=True)
class MemoryDeltas:
    """Deltas of state dicts.

    Args:
        base: tensors by name.
        state_dicts: of the experts, with the same names and shapes.
    """

    base: Mapping[str, Tensor]
    state_dicts: Sequence[Mapping[str, Tensor]]

    @property
    def experts(self) -> int:
        return len(self.state_dicts)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.base.items()}

    def read(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        import torch

        base = self.base[name].detach().reshape(-1)[start:stop].float()
        experts = [state[name].detach().reshape(-1)[start:stop].float() for state in self.state_dicts]
        return base, torch.stack(experts) - base

    def read_rows(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        base = self.base[name].detach()[rows].float()
        return base, torch.stack([state[name].detach()[rows].float() for state in self.state_dicts]) - base

    def products(self, name: str, start: int, gradient: Tensor) -> Tensor:
        return plain_products(self, name, start, gradient)

    def mix(self, name: str, start: int, coefficients: Tensor, out: Tensor) -> None:
        plain_mix(self, name, start, coefficients, out)


def plain_products(deltas: Deltas, name: str, start: int, gradient: Tensor) -> Tensor:
    """``Deltas.products`` by what is read, a piece at a time, on the gradient's device."""
    import torch

    total = torch.zeros(deltas.experts, dtype=torch.float64)
    for first, last in pieces(deltas, name, start, start + gradient.numel()):
        _, delta = deltas.read(name, first, last)
        part = gradient[first - start : last - start]
        total += (delta.to(part.device) @ part.float()).double().cpu()
    return total


def plain_mix(deltas: Deltas, name: str, start: int, coefficients: Tensor, out: Tensor) -> None:
    """``Deltas.mix`` by what is read, a piece at a time."""
    for first, last in pieces(deltas, name, start, start + out.numel()):
        base, delta = deltas.read(name, first, last)
        out[first - start : last - start] = base + coefficients @ delta


def pieces(
    deltas: Deltas, name: str, start: int = 0, stop: int | None = None, *, unit: int = 1
) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of a tensor, or of a slice of it; no edge within ``unit`` elements."""
    end = math.prod(deltas.shapes[name]) if stop is None else stop
    length = max(PIECE // unit, 1) * unit
    edges = [start, *range((start // length + 1) * length, end, length), end]
    return [(one, other) for one, other in itertools.pairwise(edges) if other > one]


def check_experts(deltas: Deltas, names: Sequence[str], labels: Sequence[str]) -> None:
    """One pass over the tensors that are learned: every delta must be there, and unlike the others.

    Args:
        deltas: of the experts.
        names: of the tensors.
        labels: of the experts, for errors.

    Raises:
        MethodError: an expert equals the base, or another expert, in all of these tensors: its coefficients
            would have no gradient, or the same as the other's; or one is not finite.
    """
    import torch

    gram = torch.zeros(deltas.experts, deltas.experts, dtype=torch.float64)
    differs = torch.zeros(deltas.experts, deltas.experts, dtype=torch.bool)
    for name in names:
        for start, stop in pieces(deltas, name):
            _, delta = deltas.read(name, start, stop)
            gram += (delta @ delta.T).double()
            for one, other in zip(*torch.nonzero(~differs, as_tuple=True), strict=True):
                if one < other:
                    differs[one, other] = not torch.equal(delta[one], delta[other])
    faults = []
    if not torch.isfinite(gram).all():
        broken = [labels[number] for number in range(len(labels)) if not torch.isfinite(gram[number, number])]
        faults.append(Fault(", ".join(broken) or "experts", "holds values that are not finite"))
    for number, label in enumerate(labels):
        if gram[number, number] == 0:
            what = "equals the base in every tensor that is learned, so it has no coefficients to learn"
            faults.append(Fault(label, what, run="Leave it out"))
        for other in range(number):
            if not differs[other, number] and gram[number, number] != 0:
                what = f"equals {labels[other]} in every tensor that is learned"
                faults.append(Fault(label, what, run="List it once"))
    if faults:
        raise MethodError(faults)
