"""The linear maps of a plan, which of its tensors are learned, and how many tokens Gram matrices need."""

from __future__ import annotations

from collections.abc import Sequence

from mixmerge.errors import Fault, MethodError
from mixmerge.methods import Method
from mixmerge.methods.roles import Tables, is_matrix
from mixmerge.plan import Task


def is_map(task: Task) -> bool:
    """Whether a task merges the matrix of a linear map; a stack of them is none."""
    return not task.copied and task.role in ("linear", "transposed") and len(task.target.shape) == 2


def is_learned(task: Task, method: Method) -> bool:
    """Whether coefficients of a tensor are learned: where the recipe asks for it, and there are any."""
    asked = task.parameters.get("learn", "all")
    if method.learns_directions and not is_matrix(task.target.shape, task.role, _tables(task)):
        return False
    return asked == "all" or (asked == "linear" and is_map(task))


def _tables(task: Task) -> Tables:
    return "spectral" if task.parameters.get("tables") == "spectral" else "mean"


def width(task: Task) -> int:
    """Inputs of a linear map."""
    return task.target.shape[1] if task.role == "linear" else task.target.shape[0]


def singular(tokens: Sequence[tuple[Task, int]]) -> list[str]:
    """What to say of linear maps whose Gram matrices are of fewer tokens than inputs.

    Args:
        tokens: of each map, the tokens of the expert that has fewest.

    Raises:
        MethodError: neither ``alpha`` nor ``ridge`` fills in what the tokens do not say.
    """
    short = [(task, count) for task, count in tokens if count < width(task)]
    if not short:
        return []
    task, fewest = max(short, key=lambda each: width(each[0]))
    what = f"{fewest} tokens for the {width(task)} inputs of {task.target.name}: its Gram matrix is singular"
    if any(task.parameters["alpha"] == 1 and task.parameters["ridge"] == 0 for task, _ in short):
        raise MethodError(
            Fault(
                "calibration",
                what,
                "alpha below 1 or ridge above 0 can do with fewer",
                "Give more or longer rows",
            )
        )
    return [f"{what} without alpha and ridge, for {len(short)} tensors; more or longer rows are better"]
