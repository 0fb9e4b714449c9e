"""Tensors that are not merged: integers and booleans, the same in every input, and the head of one expert."""

from __future__ import annotations

import numpy as np

from mixmerge.checkpoint.files import Files
from mixmerge.engine.heads import stored_bytes
from mixmerge.engine.output import Output
from mixmerge.engine.schedule import Job, Pass
from mixmerge.engine.worker import Worker
from mixmerge.errors import CheckpointError, Fault
from mixmerge.plan import Plan, Task

_PIECE = 1 << 20


def copy(plan: Plan, task: Task, files: Files, output: Output) -> Job:
    """Copy one tensor byte by byte, comparing all inputs on the way; a head may get another dtype.

    Raises:
        CheckpointError: two inputs differ.
    """

    def run(worker: Worker, number: int, start: int, stop: int) -> None:
        first, other = np.empty(stop - start, np.uint8), np.empty(stop - start, np.uint8)
        files.read(task.sources[0].tensor, start, first.data)
        for source in task.sources[1:]:
            files.read(source.tensor, start, other.data)
            if not np.array_equal(first, other):
                models = [str(plan.models[s.model].ref) for s in (task.sources[0], source)]
                raise CheckpointError(
                    Fault(
                        f"tensor {task.target.name!r}",
                        f"it holds {task.target.dtype}, and {models[0]} and {models[1]} differ in it",
                        "Integer and boolean tensors are copied, so they must be the same in every input",
                        "Give every input the same buffer first",
                    )
                )
        output.write(task, start, first.data)

    def convert(worker: Worker, number: int, start: int, stop: int) -> None:
        output.write(task, 0, memoryview(stored_bytes(only, task.target.dtype, files)))

    size, only = task.target.nbytes, task.sources[0]
    if only.adapter is not None or only.tensor.dtype != task.target.dtype:
        yield Pass(convert, [(0, size)])
        return
    yield Pass(run, [(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE)])
