"""The plain torch path: whole tensors through the methods' definitions. Any device and any float dtype.

It is the reference of the CPU kernels, the path of float64 tensors and of methods without a kernel, and what ``--device
cuda`` runs. Needs as much memory as one tensor of every input in float32, on the device and on the host; a method that
``streams`` as much as its definition says, the base's and the merged tensor with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixmerge.checkpoint.files import Files
from mixmerge.engine.cuts import Cut
from mixmerge.engine.group import Inputs
from mixmerge.engine.kernels import Context
from mixmerge.engine.reading import TORCH
from mixmerge.engine.schedule import Job, Pass
from mixmerge.engine.worker import Adapters, Worker
from mixmerge.errors import CheckpointError, Fault, MethodError
from mixmerge.kernels.philox import Draw
from mixmerge.plan import Task

if TYPE_CHECKING:
    import torch


def plain(context: Context, task: Task, *, files: Files, adapters: Adapters, device: str) -> Job:
    """Merge one tensor by the method's definition; float64 is kept where it takes part."""

    def run(worker: Worker, number: int, start: int, stop: int) -> None:
        merged = _merged(context, task, files, adapters, device)
        import torch

        refuse_unfit(merged, task)
        data = merged.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        context.write(task, 0, data.data)

    yield Pass(run, [(0, math.prod(task.target.shape))])


def refuse_unfit(merged: torch.Tensor, task: Task) -> None:
    """Raise a CheckpointError if a merged tensor is not finite."""
    import torch

    if not torch.isfinite(merged).all():
        raise CheckpointError(
            Fault(
                f"tensor {task.target.name!r}",
                f"the merged values do not fit {task.target.dtype}",
                run="Set out_dtype: bfloat16 or float32, or smaller weights",
            )
        )


def _merged(context: Context, task: Task, files: Files, adapters: Adapters, device: str) -> torch.Tensor:
    import torch

    from mixmerge.methods.memory import apply

    method, plan = context.plan.method, context.plan
    inputs = Inputs(plan, task, files, adapters, device)
    try:
        merged = apply(
            method,
            inputs if method.streams else list(inputs),
            base=inputs.base if method.base == "required" else None,
            parameters=listed(task),
            draw=Draw(plan.recipe.seed, task.target.name) if method.stochastic else None,
            cuts=None if context.cuts is None else thresholds(context.cuts[task.target.name]),
            role=task.role,
            sketch=context.sketch,
            statistics=context.statistics(task) if context.statistics else None,
        )
    except MethodError as error:
        where = f"tensor {task.target.name!r}"
        named = [dataclasses.replace(fault, where=f"{where}: {fault.where}") for fault in error.faults]
        raise MethodError(named) from error
    return merged.to(getattr(torch, TORCH[task.target.dtype]))


def listed(task: Task) -> dict[str, object]:
    """The task's parameters, as the definitions take them."""
    values: dict[str, object] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in task.parameters.items()
    }
    if task.chunks:
        values["weight"] = _by_element(task)
    if task.factors:
        values |= {"factors": task.factors, "nuclear": task.nuclear}
    return values


def _by_element(task: Task) -> list[torch.Tensor]:
    """The weight of each expert at each element, in float64: chunks are slices of the row-major tensor."""
    import torch

    from mixmerge.methods.coefficients import bounds

    lengths = [stop - start for start, stop in bounds(math.prod(task.target.shape), len(task.chunks))]
    columns = torch.tensor(task.chunks, dtype=torch.float64).T
    repeats = torch.tensor(lengths)
    return [column.repeat_interleave(repeats).reshape(task.target.shape) for column in columns]


def thresholds(limits: Sequence[Cut]) -> list[tuple[float, int]]:
    """Cuts as the definitions take them: keep above the value, or at it before an index."""
    values = np.array([cut.low_bits for cut in limits], np.uint32).view(np.float32)
    return [
        (float(value) if cut.low_bits < 0x7F800000 else float("inf"), cut.low_index + 1)
        for value, cut in zip(values, limits, strict=True)
    ]
