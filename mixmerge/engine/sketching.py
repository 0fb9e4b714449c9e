"""A method's passes over the whole model before the merge: the tensors side by side, their totals in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.files import Files
from mixmerge.engine.group import Inputs
from mixmerge.engine.plain import listed
from mixmerge.engine.schedule import Job, Pass, Schedule
from mixmerge.engine.worker import Adapters, Worker
from mixmerge.plan import Plan, Task

if TYPE_CHECKING:
    from mixmerge.methods.sketch import Group, Sketch, Totals


def group_of(plan: Plan, task: Task, *, files: Files, adapters: Adapters, device: str) -> Group:
    """One tensor of every input as the method takes them; arguments as of ``plain``."""
    from mixmerge.methods.sketch import Group

    inputs = Inputs(plan, task, files, adapters, device)
    tensors = inputs if plan.method.streams else list(inputs)
    return Group(tensors, inputs.base, task.role, listed(task))


def sketched(
    sketch: Sketch,
    plan: Plan,
    tasks: Sequence[Task],
    workers: Sequence[Worker],
    *,
    files: Files,
    adapters: Adapters,
    device: str,
) -> Any:
    """What a sketch finds in the merged tensors of a plan.

    Args:
        sketch: the passes.
        plan: the plan.
        tasks: those of its tasks that are merged.
        workers: one for each thread; no result depends on how many.
        files, adapters, device: as ``plain`` takes them.
    """
    state = None
    for number in range(sketch.passes()):

        def look(task: Task, number: int = number, state: Any = state) -> Totals:
            group = group_of(plan, task, files=files, adapters=adapters, device=device)
            return sketch.observe(number, group, state)

        state = sketch.settle(number, _totals(look, tasks, workers), state)
    return state


def _totals(look: Callable[[Task], Totals], tasks: Sequence[Task], workers: Sequence[Worker]) -> Totals:
    """What ``look`` finds in the tasks, added up in their order: what waits for its turn is a few of them."""
    from mixmerge.methods.sketch import add

    totals: Totals = {}
    waiting: dict[int, Totals] = {}
    following, lock = 0, threading.Lock()

    def job(index: int) -> Job:
        nonlocal totals, following

        def run(worker: Worker, piece: int, start: int, stop: int) -> Totals:
            return look(tasks[index])

        (found,) = yield Pass(run, [(0, 1)])
        with lock:
            waiting[index] = found
            while following in waiting:
                totals = add(totals, waiting.pop(following))
                following += 1

    Schedule(((job(index), lambda: None) for index in range(len(tasks))), workers).run()
    return totals
