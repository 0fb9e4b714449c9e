"""The key ``coefficients:`` of a recipe: learned before, and used again without data."""

from __future__ import annotations

from mixmerge.document import Node, Report, given, read_text
from mixmerge.methods import METHODS, Method

# Learned weights of experts are those of a sum of deltas, unless the method changes the deltas first.
PLAIN = "task_arithmetic"


def read_replay(top: dict[str, Node], method: Method | None, report: Report) -> str | None:
    """The path of a file of coefficients; None if there is none.

    Args:
        top: the recipe's top-level keys.
        method: its method, if it is known.
        report: gets the fault of a method that takes no coefficients, and warnings about what has no effect.
    """
    node = given(top, "coefficients")
    if node is None:
        return None
    path = read_text(node, report, "the path of a file of learned coefficients")
    if path is None:
        return None
    if method is not None and (not method.learner or method.bank) and method.name != PLAIN:
        learners = [row.name for row in METHODS.values() if row.learner and not row.bank]
        known = ", ".join([PLAIN, *learners])
        report.fault(node, f"{method.name} takes no learned coefficients", f"These do: {known}")
        return None
    if given(top, "calibration") is not None:
        report.warn(
            top["calibration"], "has no effect: the coefficients are read, not learned", run="Remove it"
        )
    return path
