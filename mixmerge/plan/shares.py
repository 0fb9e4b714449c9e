"""Weights as shares by the place of a tensor: which layers are learned, which are averaged, and what stays the base's.

For methods with the parameter ``from_layer``. What they learn, and from where, is then in each task's ``weight`` and
``learn``, as for any other learned method.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from mixmerge.errors import Fault
from mixmerge.methods import Method
from mixmerge.plan.layers import depths, layer_of
from mixmerge.plan.model import Task

_ATTENTION = re.compile(r"(?!.*norm|ln_|.*_ln).*(attn|attention).*", re.IGNORECASE)


def in_shares(tasks: Sequence[Task], method: Method, faults: list[Fault]) -> list[Task]:
    """The tasks with weights as shares of one, and with what is averaged or the base's no longer learned.

    Args:
        tasks: of the whole merge.
        method: where it has no ``from_layer``, the tasks stay as they are.
        faults: gets weights that have no shares, and a first layer that the model has not.
    """
    merged = [task for task in tasks if not task.copied]
    if method.parameter("from_layer") is None or not merged:
        return list(tasks)
    stacks = depths(task.target.name for task in merged)
    stack = max(stacks, key=lambda name: stacks[name], default="")
    first = _first(merged[0].parameters["from_layer"], stacks.get(stack, 0), faults)
    empty = [task.target.name for task in merged if sum(_weights(task)) <= 0]
    if empty:
        where = empty[0] if len(empty) == 1 else f"{empty[0]} and {len(empty) - 1} more tensors"
        what = "the weights of all experts are 0, and shares are weights divided by their sum"
        faults.append(Fault(f"parameters.weight: {where}", what, "Above 0"))
    if first is None or empty:
        return list(tasks)
    return [task if task.copied else _shared_out(task, stack, first) for task in tasks]


def _first(asked: object, depth: int, faults: list[Fault]) -> int | None:
    """The first layer that is learned: a share of the layers, below 1, is rounded down to whole ones."""
    value = float(asked)  # type: ignore[arg-type]
    first = int(value * depth) if value < 1 else int(value)
    if value >= 1 and value != first:
        what = f"is {value:g}, which is neither a share of the layers nor a number of them"
        faults.append(Fault("parameters.from_layer", what, "Below 1, or a whole number"))
        return None
    if first >= depth:
        what = f"is {value:g}, and the model has {depth} layers: none is left to learn"
        faults.append(Fault("parameters.from_layer", what, f"0 to {max(depth - 1, 0)}, or a share below 1"))
        return None
    return first


def _shared_out(task: Task, stack: str, first: int) -> Task:
    parameters, weights = task.parameters, _weights(task)
    shares = tuple(weight / sum(weights) for weight in weights)
    what = _treatment(task, stack, first)
    if what == "learned":
        start = weights if parameters["transform"] == "none" else shares
        return dataclasses.replace(task, parameters={**parameters, "weight": start})
    fixed = shares if what == "averaged" else (0.0,) * len(weights)
    return dataclasses.replace(task, parameters={**parameters, "weight": fixed, "learn": "none"})


def _treatment(task: Task, stack: str, first: int) -> Literal["learned", "averaged", "base"]:
    place = layer_of(task.target.name)
    if place is None or place[0] != stack:
        return "averaged" if task.parameters["outside"] == "mean" else "base"
    attends = any(_ATTENTION.fullmatch(part) for part in task.target.name.removeprefix(stack).split("."))
    if place[1] < first or (task.parameters["average_attention"] and attends):
        return "averaged"
    return "learned"


def _weights(task: Task) -> tuple[float, ...]:
    given = task.parameters["weight"]
    return tuple(float(one or 0.0) for one in given) if isinstance(given, tuple) else ()
