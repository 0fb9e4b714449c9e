"""EMR-Merging: one unified delta, and for each task the entries of it that agree with its expert, rescaled.

``emr`` is the model of one task, ``emr_masks`` what the models of all tasks share and what each keeps of it.
Shapes: deltas, base and result ``S``; T experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.methods.average import scalar
from mixmerge.methods.records import ALL, misplaced
from mixmerge.methods.sketch import Group, Totals
from mixmerge.methods.sums import total

Rescaler = Literal["sums", "means"]


def expert_at(task: float, count: int, *, name: str = "task") -> int:
    """The position that a parameter, ``task`` by its name, has among ``count`` experts.

    Raises:
        MethodError: it is none of theirs.
    """
    what = misplaced(task, count)
    if what:
        raise MethodError(Fault(name, what))
    return int(task)


def unified(deltas: Sequence[Tensor], like: Tensor) -> Tensor:
    """Of each entry, the largest magnitude among the experts that agree with the sign of the experts' sum.

    Args:
        deltas: ``S`` each; each is asked for twice.
        like: ``S``, for shape, dtype and device.
    """
    added = torch.zeros_like(like)
    for delta in deltas:
        added = added + delta
    positive, largest = added > 0, torch.zeros_like(like)
    for delta in deltas:
        largest = torch.maximum(largest, torch.where(positive, delta, -delta))
    return torch.where(positive, largest, -largest)


def agreeing(one: Tensor, delta: Tensor) -> Tensor:
    """The entries of a unified delta that have the sign of an expert's, the others 0: ``S`` each."""
    return torch.where(_agree(one, delta), one, torch.zeros_like(one))


def _agree(one: Tensor, delta: Tensor) -> Tensor:
    return torch.sign(one) == torch.sign(delta)  # never a product, which may underflow


@dataclass(frozen=True)
class Masked:
    """One tensor of all tasks: the model of task t has ``base + factors[t] * unified`` where ``keep(t)``, else base.

    Args:
        unified: ``S``: the delta that the tasks share.
        keep: of a task's position, ``S`` of bools.
        factors: ``(T,)``, in the dtype of ``unified``.
    """

    unified: Tensor
    keep: Callable[[int], Tensor]
    factors: Tensor


def emr(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    task: float,
    sketch: Sequence[Magnitudes] | None = None,
    rescaler: Rescaler = "sums",
    lambda_: float | Tensor = 1.0,
) -> Tensor:
    """The model of one task: ``base + lambda * l_t * M_t * u``.

    ``u`` is ``unified``: of each entry the largest magnitude among the experts whose sign is that of the sum of all
    deltas (a sum of 0 counts as negative). ``M_t`` keeps the entries of ``u`` with the sign of expert t's delta, and
    ``l_t = sum |delta_t| / sum |M_t * u|`` gives them the size of that delta. With one expert it is that expert.

    Source: EMR-Merging (arXiv:2405.17461), the merging procedure; ``rescaler: means`` is the authors' code.

    Args:
        deltas, base: one tensor group. Every delta is asked for twice, that of ``task`` three times.
        task: position of the expert the model is for, from 0.
        sketch: of the task alone, the sums of ``l_t`` over the whole model.
        rescaler: ``sums``: the formula; ``means``: both sums are over tensors of the means of their entries, so a
            norm's vector counts as much as an embedding.
        lambda_: factor on the delta; 1 in the paper.

    Raises:
        MethodError: ``task`` is no position of an expert, or there is no sketch.

    Deviations:
        an expert that has no entry left (it is the base, or others outvote it everywhere) gets the base, where the
        published code divides 0 by 0.
    """
    at = expert_at(task, len(deltas))
    (factor,) = _factors(sketch, rescaler, lambda_, base)
    return base + factor * agreeing(unified(deltas, base), deltas[at])


def emr_masks(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    task: str = ALL,
    sketch: Sequence[Magnitudes] | None = None,
    rescaler: Rescaler = "sums",
    lambda_: float | Tensor = 1.0,
) -> Masked:
    """What ``emr`` of every task is made of, to the bit.

    Source: as ``emr``.

    Args:
        deltas, base: one tensor group; each delta is asked for twice, and once for its mask.
        task: all of them.
        sketch: of each task, the sums of ``l_t`` over the whole model.
        rescaler, lambda_: as in ``emr``.

    Raises:
        MethodError: there is no sketch.
    """
    one = unified(deltas, base)
    factors = torch.stack(_factors(sketch, rescaler, lambda_, base))
    return Masked(one, lambda at: _agree(one, deltas[at]), factors)


def _factors(
    sketch: Sequence[Magnitudes] | None, rescaler: Rescaler, lambda_: float | Tensor, base: Tensor
) -> list[Tensor]:
    if sketch is None:
        raise MethodError(
            Fault("sketch", "emr needs the sums of the whole model", run="use merge_state_dicts")
        )
    whole = scalar(lambda_, base).to(base.dtype)
    return [whole * scalar(one.factor(rescaler), base).to(base.dtype) for one in sketch]


@dataclass(frozen=True)
class Magnitudes:
    """Of one expert: its delta's magnitudes, and those of its entries of the unified delta.

    Args:
        delta, kept: their sums over the model.
        delta_means, kept_means: the sums over tensors of their means.
    """

    delta: float
    kept: float
    delta_means: float
    kept_means: float

    def factor(self, rescaler: Rescaler) -> float:
        """What gives the kept entries the size of the delta; 1 where nothing is kept."""
        if rescaler not in ("sums", "means"):
            raise MethodError(Fault("rescaler", f"is {rescaler!r}", "Known: means, sums"))
        pair = (self.delta, self.kept) if rescaler == "sums" else (self.delta_means, self.kept_means)
        return pair[0] / pair[1] if pair[1] > 0 else 1.0


class EmrSketch:
    """One pass: the sums behind the rescaler of the task's expert, or of every task's."""

    def passes(self) -> int:
        return 1

    def observe(self, number: int, group: Group, state: Any) -> Totals:
        task, count = group.parameters["task"], len(group.tensors)
        wanted = range(count) if task == ALL else [expert_at(task, count)]
        if group.base is None or not group.base.numel():
            return {}
        one = unified(group.tensors, group.base)
        sums = np.array([_sizes(one, group.tensors[at]) for at in wanted])  # (T or 1, 2)
        return {"sums": sums, "means": sums / one.numel()}

    def settle(self, number: int, totals: Totals, state: Any) -> tuple[Magnitudes, ...]:
        nothing = np.zeros((1, 2))
        sums, means = (totals.get(name, nothing).tolist() for name in ("sums", "means"))
        return tuple(Magnitudes(*each, *mean) for each, mean in zip(sums, means, strict=True))


def _sizes(one: Tensor, delta: Tensor) -> tuple[float, float]:
    return total(delta.abs()), total(agreeing(one, delta).abs())
