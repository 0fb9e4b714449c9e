"""A factor for each singular direction of the deltas' sum, learned so that the merge answers as each expert does.

With W = W0 + k U diag(c) V.T, k = lambda * mean(S), the gradient of a factor is dL/dc_i = k u_i.T (dL/dW) v_i. A hook
takes it of a tensor's gradient as soon as that is there, and frees it: memory is one model, U and V of each learned
matrix in the model's dtype, and one tensor's gradient, however many experts there are. After a step the weights are
made anew from the base as stored.

Shapes: m outputs, n inputs and r directions of a matrix, R directions of all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixmerge.calibrate.aligning import aligned, check_losses
from mixmerge.calibrate.coefficients import CoefficientSpace, Layout
from mixmerge.calibrate.deltas import check_experts
from mixmerge.calibrate.learning import Learned, Learning, Progress, descend
from mixmerge.calibrate.lessons import Lesson, all_batches, check_outputs, step_sizes
from mixmerge.calibrate.mixed import watching
from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mixmerge.methods.sketch import Group


@dataclass(frozen=True)
class Directions:
    """Of one matrix of a tensor, what its factors stretch.

    Args:
        u: (m, r).
        v: (n, r).
        scale: k, by which all are multiplied.
        nuclear: sum of the singular values.
        number: which matrix of a stack; None where the tensor is one.
        turned: the tensor holds it as inputs x outputs.
    """

    u: Tensor
    v: Tensor
    scale: float
    nuclear: float
    number: int | None
    turned: bool

    @property
    def count(self) -> int:
        """r."""
        return self.u.shape[1]

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix (m, n) of a tensor, a view of it."""
        part = tensor if self.number is None else tensor[self.number]
        return part.mT if self.turned else part

    def products(self, gradient: Tensor) -> Tensor:
        """k u_i.T G v_i of every direction (r,), of a tensor's gradient; float64 on the CPU."""
        import torch

        g = self.of(gradient)
        inner = (g @ self.v).mul_(self.u) if len(self.u) <= len(self.v) else (g.mT @ self.u).mul_(self.v)
        return inner.sum(0, dtype=torch.float32).double().cpu() * self.scale

    def add_to(self, tensor: Tensor, factors: Tensor) -> None:
        """Add k U diag(c) V.T to its matrix of a tensor, in place; c (r,)."""
        stretched = (self.u.float() * (self.scale * factors).to(self.u.device).float()).to(self.u.dtype)
        self.of(tensor).add_(stretched @ self.v.mT)


def directions_of(group: Group, dtype: torch.dtype) -> tuple[Directions, ...]:
    """The directions of each matrix that a tensor is or holds, as ``learned_spectrum`` finds them; of zeros none.

    Args:
        group: of a tensor that the spectral methods take for a matrix, or a stack of them.
        dtype: of U and V.
    """
    from mixmerge.methods.lowrank import total
    from mixmerge.methods.spectral import matrices, triplets

    given, found = group.parameters, []
    shape = group.tensors[0].shape if group.base is None else group.base.shape
    for number, each in matrices(group.tensors, given["weight"], shape=shape, role=group.role):
        parts = triplets(total(each), tolerance=given["tolerance"])
        if len(parts.s):
            scale = float(given["lambda"]) * float(parts.s.mean())
            nuclear, turned = float(parts.s.sum()), group.role == "transposed"
            u, v = parts.u.to(dtype), parts.v.to(dtype)
            found.append(Directions(u, v, scale, nuclear, number, turned))
    return tuple(found)


class Stretched:
    """Parameters of a model that hold the base and the stretched directions, and the gradients of the factors.

    Args:
        parameters: by name; those that are not learned may be buffers.
        directions: by name, of each matrix of the tensors that are learned, in their order.
        group: of a tensor by its name, what ``learned_spectrum`` takes.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        directions: Mapping[str, tuple[Directions, ...]],
        group: Callable[[str], Group],
    ) -> None:
        import torch

        self._parameters, self._directions, self._group = parameters, directions, group
        rows: dict[str, tuple[int, ...]] = {}
        count = 0
        for name, parts in directions.items():
            rows[name] = tuple(range(count, count + sum(part.count for part in parts)))
            count += len(rows[name])
        self.layout = Layout(
            rows,
            ((1.0,),) * count,
            {name: (1.0,) for name in parameters if name not in directions},
            {name: sum(part.nuclear for part in parts) for name, parts in directions.items()},
        )
        self.gradient = torch.zeros(count, 1, dtype=torch.float64)

    def watched(self) -> AbstractContextManager[None]:
        """While in it, only what is learned has gradients, and each is taken in and freed as it comes."""
        return watching(self._parameters, self._directions, self._add)

    def _add(self, name: str, gradient: Tensor) -> None:
        at = self.layout.rows[name][0]
        for part in self._directions[name]:
            self.gradient[at : at + part.count, 0] += part.products(gradient)
            at += part.count

    def build(self, values: Tensor, *, everything: bool = False) -> None:
        """Put the merged weights into the parameters.

        Args:
            values: factors (R, 1), in the order of the layout.
            everything: also the tensors that no step changes.
        """
        import torch

        with torch.no_grad():
            for name, parts in self._directions.items():
                self._build(name, parts, values)
            for name in self.layout.fixed if everything else ():
                self._parameters[name].data.copy_(_isotropic(self._group(name)))

    def _build(self, name: str, parts: tuple[Directions, ...], values: Tensor) -> None:
        base, at = self._group(name).base, self.layout.rows[name][0]
        if base is None:
            raise TypeError(f"{name} has no base")
        merged = base.clone()
        for part in parts:
            part.add_to(merged, values[at : at + part.count, 0])
            at += part.count
        self._parameters[name].data.copy_(merged)


def _isotropic(group: Group) -> Tensor:
    """A tensor merged with factors 1."""
    from mixmerge.methods.spectrum import learned_spectrum

    if group.base is None:
        raise TypeError("a tensor has no base")
    given = group.parameters
    return learned_spectrum(
        group.tensors,
        base=group.base,
        weight=given["weight"],
        lambda_=given["lambda"],
        tables=given["tables"],
        tolerance=given["tolerance"],
        role=group.role,
    )


def spectrum(lesson: Lesson, *, progress: Progress | None = None) -> Learned:
    """Learned spectrum: factors of directions, so that the merged model's logits are each expert's on its own rows.

    Raises:
        MethodError: a model without a head, experts that equal the base or each other in all matrices, no matrix
            whose deltas have a sum, and what ``descend`` raises.
        OutputError: no room for the experts' states.
    """
    check_outputs("spectrum", lesson.kind, type(lesson.model).__name__)
    check_losses(lesson.options)
    size, each = step_sizes(int(lesson.number("rows")), lesson.batch_size)
    shown = all_batches(lesson, size, "spectrum")
    names = [name for name in lesson.deltas.shapes if name not in lesson.frozen]
    nothing = Fault("learn", "no matrix has directions that are learned", "all, or linear")
    if not names:
        raise MethodError(nothing)
    check_experts(lesson.deltas, names, lesson.labels)
    found = {name: directions_of(lesson.group(name), lesson.parameters[name].dtype) for name in names}
    found = {name: parts for name, parts in found.items() if parts}
    if not found:  # deltas that cancel out
        raise MethodError(nothing)
    with tempfile.TemporaryDirectory(prefix="mixmerge-teachers-", dir=lesson.scratch) as folder:
        objective = aligned(lesson, shown, each, Path(folder))
        learning = Learning(
            steps=int(lesson.number("steps")),
            learning_rate=lesson.number("learning_rate"),
            regulariser=lesson.number("regulariser"),
            turn=objective.schedule.turn,
            seed=lesson.seed % 2**63,
        )
        held = Stretched(lesson.parameters, found, lesson.group)
        space = CoefficientSpace(clamp="none")
        return descend(held, held.layout, objective, space, learning=learning, progress=progress)
