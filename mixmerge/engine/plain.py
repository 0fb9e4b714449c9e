"""The plain torch path: whole tensors through the methods' definitions. Any device and any float dtype.

It is the reference of the CPU kernels, the path of float64 tensors, and what ``--device cuda`` runs. Needs as
much memory as one tensor of every input in float32, on the device and on the host.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mixmerge.checkpoint.files import Files
from mixmerge.engine.kernels import Context
from mixmerge.engine.schedule import Job, Pass
from mixmerge.engine.worker import Adapters, Worker
from mixmerge.errors import CheckpointError, Fault
from mixmerge.kernels.philox import Draw
from mixmerge.plan import Source, Task

if TYPE_CHECKING:
    import torch

_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def wide(task: Task) -> bool:
    """Whether float64 takes part, which the kernels do not do."""
    inputs = (*task.sources, *((task.base,) if task.base else ()))
    return "F64" in {task.target.dtype, *(source.tensor.dtype for source in inputs)}


def plain(context: Context, task: Task, *, files: Files, adapters: Adapters, device: str) -> Job:
    """Merge one tensor by the method's definition; float64 is kept where it takes part."""

    def run(worker: Worker, number: int, start: int, stop: int) -> None:
        merged = _merged(context, task, files, adapters, device)
        import torch

        if not torch.isfinite(merged).all():
            raise CheckpointError(
                Fault(
                    f"tensor {task.target.name!r}",
                    f"the merged values do not fit {task.target.dtype}",
                    run="Set out_dtype: bfloat16 or float32, or smaller weights",
                )
            )
        data = merged.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        context.write(task, 0, data.data)

    yield Pass(run, [(0, math.prod(task.target.shape))])


def _merged(context: Context, task: Task, files: Files, adapters: Adapters, device: str) -> torch.Tensor:
    import torch

    from mixmerge.methods.memory import apply

    method, plan = context.plan.method, context.plan
    work = torch.float64 if wide(task) else torch.float32
    base = None
    if task.base:
        base = _finite(read_tensor(task.base, files, adapters, work, device), task.base, context)
    tensors = []
    for source in task.sources:
        value = _finite(read_tensor(source, files, adapters, work, device), source, context)
        if method.takes == "deltas" and base is not None and not source.delta_only:
            value = value - base
        elif method.takes == "experts" and source.delta_only and base is not None:
            value = value + base
        tensors.append(value)
    parameters = {
        name: list(value) if isinstance(value, tuple) else value for name, value in task.parameters.items()
    }
    cuts = None
    if context.cuts is not None:
        limits = context.cuts[task.target.name]
        values = np.array([cut.low_bits for cut in limits], np.uint32).view(np.float32)
        cuts = [
            (float(value) if cut.low_bits < 0x7F800000 else float("inf"), cut.low_index + 1)
            for value, cut in zip(values, limits, strict=True)
        ]
    merged = apply(
        method,
        tensors,
        base=base if method.base == "required" else None,
        parameters=parameters,
        draw=Draw(plan.recipe.seed, task.target.name) if method.stochastic else None,
        cuts=cuts,
    )
    return merged.to(getattr(torch, _TORCH[task.target.dtype]))


def read_tensor(
    source: Source, files: Files, adapters: Adapters, work: torch.dtype, device: str
) -> torch.Tensor:
    """One input in the working dtype, its adapter added; the adapter's delta alone where that is exact."""
    import torch

    header = source.tensor
    if header.elements == 0:
        return torch.zeros(header.shape, dtype=work, device=device)
    data = np.empty(header.nbytes, np.uint8)
    files.read(header, 0, data.data)
    stored = torch.from_numpy(data).view(getattr(torch, _TORCH[header.dtype])).reshape(header.shape)
    value = stored.to(work)
    if source.adapter is not None:
        loaded = adapters.get(source.adapter)
        rows, weight = header.shape[0], value.float().reshape(header.shape[0], -1).numpy()
        if source.delta_only:
            changed = loaded.rows(0, rows, weight if loaded.needs_weight else None)
        else:
            changed = loaded.expert(0, rows, weight)
        value = torch.from_numpy(changed).reshape(header.shape).to(work)
    return value.to(device)


def _finite(value: torch.Tensor, source: Source, context: Context) -> torch.Tensor:
    """The value, unless it has NaN or Inf: a mask might drop them, and the model would still be broken."""
    import torch

    wrong = torch.flatten(~torch.isfinite(value)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise CheckpointError(
            Fault(
                str(context.plan.models[source.model].ref),
                f"tensor {source.tensor.name!r} has {float(value.reshape(-1)[at])} at element {at:,} of its data",
                run=f"The model is broken; its file is {source.tensor.file}",
            )
        )
    return value
