"""Masks of a merge for all tasks: the base is written as it is, and beside it what the tasks' models are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.files import Files
from mixmerge.checkpoint.header import read_header
from mixmerge.checkpoint.identity import fingerprint
from mixmerge.checkpoint.reader import open_checkpoint
from mixmerge.engine.group import Inputs
from mixmerge.engine.kernels import Context
from mixmerge.engine.output import Output
from mixmerge.engine.plain import listed, refuse_unfit
from mixmerge.engine.reading import TORCH
from mixmerge.engine.schedule import Job, Pass
from mixmerge.engine.sketching import sketched
from mixmerge.engine.target import MASKS, MASKS_CARD
from mixmerge.engine.worker import Adapters, Worker
from mixmerge.errors import CheckpointError, Fault
from mixmerge.plan import Plan, Task
from mixmerge.registry import load

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.bank.masks import MaskedTensor

Told = Callable[[str, int, int], None]
PART = 1 << 28  # bytes of a file, unless one tensor is larger: what is in memory, and what a kill can cost


def base_alone(context: Context, task: Task, *, files: Files, adapters: Adapters, device: str) -> Job:
    """Write the base's tensor, which the masks are of."""

    def run(worker: Worker, number: int, start: int, stop: int) -> None:
        import torch

        base = Inputs(context.plan, task, files, adapters, device).base
        if base is None:
            raise CheckpointError(Fault(f"tensor {task.target.name!r}", "has no base"))
        stored = base.to(getattr(torch, TORCH[task.target.dtype]))
        if not torch.equal(stored.to(base.dtype), base):
            what = f"{task.target.dtype} does not hold the base's values"
            raise CheckpointError(Fault(f"tensor {task.target.name!r}", what, run="Set out_dtype: float32"))
        context.write(task, 0, stored.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    yield Pass(run, [(0, math.prod(task.target.shape))])


def add_masks(
    plan: Plan,
    output: Output,
    files: Files,
    *,
    device: str,
    threads: int,
    progress: Told | None = None,
) -> None:
    """Write the masks of a plan whose base is written; files that an earlier run finished stay.

    Args:
        plan: with masks.
        output: with the base and its config.
        files: open files of the inputs.
        device: as of the merge.
        threads: of the passes before.
        progress: called with ("masks", tensors done, tensors in all).

    Raises:
        CheckpointError: a task's model does not fit the output's dtype.
        OutputError: the disk refuses.
    """
    if plan.masks is None or output.has(MASKS_CARD):
        return
    from mixmerge.bank.mask_files import MaskCard
    from mixmerge.bank.vouched import FileCard

    tasks = [task for task in plan.tasks if not task.copied and task.target.nbytes]
    parts = _Files(output)
    left = [task for task in tasks if task.target.name not in parts.done]
    if left:
        adapters = Adapters()
        workers = [Worker(plan, files, adapters, 1) for _ in range(threads if device == "cpu" else 1)]
        found = sketched(
            load(plan.method.sketch)(), plan, tasks, workers, files=files, adapters=adapters, device=device
        )
        del workers
        for count, task in enumerate(left, len(tasks) - len(left) + 1):
            made = _masked(plan, task, found, files, adapters, device)
            if made is not None:
                parts.add(task.target.name, made)
            if progress is not None:
                progress("masks", count, len(tasks))
        parts.flush()
    place = output.partial
    base = fingerprint(place, open_checkpoint(place, name=str(output.out)).tensors.values())
    cards = {path.name: FileCard.of(path) for path in parts.paths()}
    card = MaskCard(method=plan.method.name, tasks=plan.masks.tasks, base=base, files=cards)
    output.keep(MASKS_CARD, card.text().encode())


class _Files:
    """Masked tensors gathered into files, each of which is vouched for when it is whole."""

    def __init__(self, output: Output) -> None:
        self._output, self._count = output, 0
        self._waiting: dict[str, Tensor] = {}
        self.done: set[str] = set()
        from mixmerge.bank.masks import names_in

        while output.has(self._name(self._count + 1)):
            self._count += 1
            self.done |= set(names_in(read_header(output.partial / self._name(self._count))))

    def add(self, name: str, made: MaskedTensor) -> None:
        self._waiting |= made.tensors(name)
        if sum(one.nbytes for one in self._waiting.values()) >= PART:
            self.flush()

    def flush(self) -> None:
        from safetensors.torch import save

        if self._waiting:
            self._count += 1
            self._output.keep(self._name(self._count), save(self._waiting))
            self._waiting = {}

    def paths(self) -> Iterator[Any]:
        for number in range(1, self._count + 1):
            yield self._output.partial / self._name(number)

    def _name(self, number: int) -> str:
        return f"{MASKS}/masks-{number:05}.safetensors"


def _masked(
    plan: Plan, task: Task, sketch: Any, files: Files, adapters: Adapters, device: str
) -> MaskedTensor | None:
    """One tensor of all tasks; None where every task has the base's."""
    import torch

    from mixmerge.bank.masks import MaskedTensor
    from mixmerge.methods.memory import apply

    inputs = Inputs(plan, task, files, adapters, device)
    if inputs.base is None:
        raise CheckpointError(Fault(f"tensor {task.target.name!r}", "has no base"))
    row = replace(plan.method, function=plan.method.masks)
    found: Any = apply(row, inputs, base=inputs.base, parameters=listed(task), role=task.role, sketch=sketch)
    stored = getattr(torch, TORCH[task.target.dtype])
    made = MaskedTensor.of(found.unified, found.keep, found.factors, base=inputs.base, stored=stored)
    origin, changed = inputs.base.cpu().to(stored), False
    for number in range(len(inputs)):
        merged = made.of_task(origin, number)
        refuse_unfit(merged, task)
        changed |= not torch.equal(merged.reshape(-1).view(torch.uint8), origin.reshape(-1).view(torch.uint8))
    return made if changed else None
