"""The inputs of one task as torch tensors: all of them at once, or each when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from mixmerge.checkpoint.files import Files
from mixmerge.engine.reading import read_factors, read_tensor
from mixmerge.engine.worker import Adapters
from mixmerge.errors import CheckpointError, Fault
from mixmerge.plan import Plan, Source, Task

if TYPE_CHECKING:
    import torch


class Inputs(Sequence["torch.Tensor"]):
    """The experts or deltas of one task, in recipe order, in the dtype they are merged in.

    Every index reads the tensor anew; a method that needs one at a time never holds two. To a row with ``factors``
    the delta of an adapter is a ``LowRank``.

    Args:
        plan, task: what is merged.
        files, adapters: what reads it.
        device: where the tensors go.
        of: with ``number``, the inputs of which these are one matrix.
        number: which matrix of the stack that a tensor is.

    Raises:
        CheckpointError: an input holds NaN or Inf.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        files: Files,
        adapters: Adapters,
        device: str,
        *,
        of: Inputs | None = None,
        number: int | None = None,
    ) -> None:
        import torch

        self._plan, self._task, self._files = plan, task, files
        self._adapters, self._device, self._number = adapters, device, number
        self._work = torch.float64 if task.wide else torch.float32
        self.base: torch.Tensor | None = None
        if of is not None:
            self.base = None if of.base is None or number is None else of.base[number]
        elif task.base:
            self.base = self._read(task.base)

    def part(self, number: int) -> Inputs:
        """The inputs of one matrix, of tensors that are stacks of them: nothing else is read."""
        return Inputs(
            self._plan, self._task, self._files, self._adapters, self._device, of=self, number=number
        )

    def __len__(self) -> int:
        return len(self._task.sources)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        source, method = self._task.sources[index], self._plan.method
        if method.factors and method.takes == "deltas":
            found = read_factors(source, self._adapters, self._work, self._device, part=self._number)
            if found is not None:
                return found
        value = self._read(source)
        if method.takes == "deltas" and self.base is not None and not source.delta_only:
            value = value - self.base
        elif method.takes == "experts" and source.delta_only and self.base is not None:
            value = value + self.base
        return value

    def _read(self, source: Source) -> torch.Tensor:
        value = read_tensor(source, self._files, self._adapters, self._work, self._device, part=self._number)
        return _finite(value, source, self._plan, self._number)


def _finite(value: torch.Tensor, source: Source, plan: Plan, part: int | None) -> torch.Tensor:
    """The value, unless it has NaN or Inf: a mask might drop them, and the model would still be broken."""
    import torch

    if torch.isfinite(value).all():
        return value
    at = int(torch.flatten(~torch.isfinite(value)).nonzero()[0])
    before = (part or 0) * value.numel()
    raise CheckpointError(
        Fault(
            str(plan.models[source.model].ref),
            f"tensor {source.tensor.name!r} has {float(value.reshape(-1)[at])} at element {before + at:,} of its data",
            run=f"The model is broken; its file is {source.tensor.file}",
        )
    )
