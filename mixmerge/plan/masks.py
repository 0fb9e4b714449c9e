"""Masks of a plan: whose tasks they are of, and what they can take. From headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.header import DTYPE_BYTES
from mixmerge.errors import Fault
from mixmerge.methods import ALL, Method

if TYPE_CHECKING:
    from mixmerge.plan.model import Task

_HOLD = {"BF16": ("BF16", "F32", "F64"), "F16": ("F16", "F32", "F64"), "F32": ("F32", "F64"), "F64": ("F64",)}


@dataclass(frozen=True)
class MaskPlan:
    """What stands beside a base whose folder is the model of every task.

    Args:
        tasks: names of the experts, in the recipe's order.
        nbytes: that their files take at most.
        bytes_of_models: that a folder for each task would take.
    """

    tasks: tuple[str, ...]
    nbytes: int
    bytes_of_models: int

    def facts(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "tasks": list(self.tasks),
            "bytes_at_most": self.nbytes,
            "bytes_of_models": self.bytes_of_models,
        }


def plan_masks(
    method: Method, experts: Sequence[str], tasks: Sequence[Task], faults: list[Fault]
) -> MaskPlan | None:
    """The masks of a recipe; None if it makes one model.

    Args:
        method: its row.
        experts: their names.
        tasks: of its plan.
        faults: gets the tensors of a base that the output's dtype does not hold.
    """
    merged = [task for task in tasks if not task.copied]
    if not method.masks or not any(task.parameters.get("task") == ALL for task in merged):
        return None
    rounded = [task.target.name for task in merged if not _held(task)]
    if rounded:
        more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        what = f"task: {ALL} keeps the base as it is, and the output's dtype rounds it: {rounded[0]}{more}"
        faults.append(
            Fault("out_dtype", what, "As wide as the base", "Leave out_dtype and dtype out, or float32")
        )
    nbytes = sum(_at_most(task, len(experts)) for task in merged)
    return MaskPlan(tuple(experts), nbytes, len(experts) * sum(task.target.nbytes for task in tasks))


def _held(task: Task) -> bool:
    base = task.base
    if base is None:
        return True
    dtype = "F32" if base.adapter is not None and base.tensor.dtype != "F64" else base.tensor.dtype
    return task.target.dtype in _HOLD.get(dtype, ())


def _at_most(task: Task, count: int) -> int:
    inputs = [*task.sources, *([task.base] if task.base else [])]
    width = max(4, *(DTYPE_BYTES[source.tensor.dtype] for source in inputs), DTYPE_BYTES[task.target.dtype])
    elements = math.prod(task.target.shape)
    return elements * width + count * (-(-elements // 8) + width)
