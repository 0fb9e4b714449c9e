"""What each expert has besides the shared model, tensor by tensor: whole, or as factors where it is known as such.

Legend: o outputs and d inputs of a matrix, r ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixmerge.checkpoint.files import Files
from mixmerge.checkpoint.header import TensorHeader
from mixmerge.engine.reading import read_factors, read_tensor
from mixmerge.engine.worker import Adapters
from mixmerge.plan import Plan, Source, Task
from mixmerge.plan.bank import BankSite

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.bank.records import Entry

_DEVICE = "cpu"  # where all decompositions are made, in float64
# Shared parts that are weighted sums of the experts' changes, so that what remains of adapters are adapters.
_SUMS = ("task_arithmetic", "adamerging", "adamerging_labels", "expert_merging")


class Parts:
    """The experts' parts of a plan: ``expert - shared``, the shared tensor as it was written.

    Args:
        plan: with a bank.
        shared: the written tensors, by name.
        files, adapters: what reads them.
    """

    def __init__(self, plan: Plan, shared: dict[str, TensorHeader], files: Files, adapters: Adapters) -> None:
        self._plan, self._shared, self._files, self._adapters = plan, shared, files, adapters

    def matrix(self, task: Task, site: BankSite, expert: int) -> Tensor | Entry | None:
        """An expert's part of a matrix: ``(o, d)``, of a table as it is stored; None where the two are the same.

        Of adapters over the very base of a shared part that is a weighted sum it is a product of factors and is never
        multiplied out: the ranks of all adapters in it add up. The rounding of the shared tensor to the output's type
        is not in it.
        """
        weights = _weights(self._plan, task)
        factors = None if weights is None else [self._factors(task, source) for source in task.sources]
        if weights is not None and factors is not None and None not in factors:
            shares = [float(number == expert) - weight for number, weight in enumerate(weights)]
            return _stacked([one for one in factors if one is not None], shares, site)
        part = self.whole(task, expert)
        if part is None:
            return None
        return part.T if site.turned and site.kind == "linear" else part

    def whole(self, task: Task, expert: int) -> Tensor | None:
        """An expert's part as it is stored, in float32 (float64 where that takes part); None where it is nothing."""
        import torch

        if self._untouched(task):
            return None
        work = torch.float64 if task.wide else torch.float32
        source = task.sources[expert]
        value = read_tensor(source, self._files, self._adapters, work, _DEVICE)
        if source.delta_only and task.base is not None:
            value = value + read_tensor(task.base, self._files, self._adapters, work, _DEVICE)
        written = Source(source.model, self._shared[task.target.name])
        value = value - read_tensor(written, self._files, self._adapters, work, _DEVICE)
        return value.float()

    def _untouched(self, task: Task) -> bool:
        """No adapter changes the tensor, and the shared part is that of the base."""
        return _weights(self._plan, task) is not None and all(_is_base(task, one) for one in task.sources)

    def _factors(self, task: Task, source: Source) -> tuple[Tensor, Tensor] | tuple[()] | None:
        """``(o, r)`` and ``(r, d)`` as stored; empty where an adapter leaves the tensor alone; None: no factors."""
        import torch

        if _is_base(task, source):
            return ()
        found = read_factors(source, self._adapters, torch.float32, _DEVICE)
        return None if found is None or found.ndim != 2 else (found.b, found.a)


def _is_base(task: Task, source: Source) -> bool:
    base = task.base
    if base is None or source.adapter is not None or base.adapter is not None:
        return False
    return (source.tensor.file, source.tensor.offset) == (base.tensor.file, base.tensor.offset)


def _weights(plan: Plan, task: Task) -> list[float] | None:
    """What the shared part has of each expert's change, where it is a weighted sum of them; else None."""
    if plan.method.name not in _SUMS or task.chunks or task.base is None:
        return None
    given = task.parameters["weight"]
    weights = [float(value or 0.0) for value in given] if isinstance(given, tuple) else []
    if task.parameters.get("normalize"):
        total = sum(weights)
        weights = [weight / total for weight in weights]
    factor = float(task.parameters.get("lambda", 1.0))  # type: ignore[arg-type]
    return [factor * weight for weight in weights]


def _stacked(
    factors: Sequence[tuple[Tensor, Tensor] | tuple[()]], shares: Sequence[float], site: BankSite
) -> Entry | None:
    """``sum_e share_e * b_e @ a_e`` as one product."""
    import torch

    from mixmerge.bank.records import Entry

    used = [(pair, share) for pair, share in zip(factors, shares, strict=True) if pair and share]
    if not used:
        return None
    left = torch.cat([pair[0] for pair, _ in used], 1)  # (m, r)
    right = torch.cat([pair[1] for pair, _ in used])  # (r, n)
    scale = torch.cat([torch.full((pair[0].shape[1],), share) for pair, share in used])
    if site.kind == "embedding":
        return Entry(left, right, scale, "embedding", site.tied)
    return Entry(left.T, right.T, scale) if site.turned else Entry(right, left.T, scale)
