"""What is in a checkpoint, and how experts differ: from headers alone, and with a base from all the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import Fault, MixmergeError
from mixmerge.inspect.contents import Contents, Input, Reference, as_data, describe, open_inputs
from mixmerge.inspect.names import BY, By
from mixmerge.machine import cores
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.inspect.comparison import Comparison

__all__ = ["BY", "By", "Inspection", "Reference", "inspect_models"]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        models: what is in each, in the order given.
        comparison: how they differ from the base; None for one model without one.
        warnings: what a person should know.
    """

    models: tuple[Contents, ...]
    comparison: Comparison | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON data; the fields are those of the dataclasses."""
        data: dict[str, Any] = as_data(self)
        return data


def inspect_models(
    models: Sequence[str | Path | Reference] | str | Path | Reference,
    *,
    base: str | Path | Reference | None = None,
    by: By = "layer",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look into models and, where there is a base, compare them.

    One model without a base is described from its headers in milliseconds. With a base every weight is read
    once, in chunks. Several models without ``base`` are compared with the model that all of them put an
    adapter on, or else with the first of them, and a warning says so. Sums are float64 and do not depend on
    the number of threads.

    Args:
        models: folders or hub ids; with an adapter, ``ModelRef.parse("MODEL+ADAPTER")`` of ``mixmerge.recipe``.
        base: what deltas are taken from; it may be among the models.
        by: what a row of the tables is: ``layer``, ``kind`` (of module) or ``tensor``.
        threads: default: all cores.
        progress: called with bytes done and bytes in all.

    Raises:
        MixmergeError: no model, one named twice, or an unknown ``by``.
        CheckpointError: a folder is missing or damaged, shapes differ from the base's, or weights are NaN or
            Inf.
    """
    listed = [models] if isinstance(models, str | Path) or not isinstance(models, Sequence) else list(models)
    if by not in BY:
        raise MixmergeError(Fault("by", f"is {by!r}", choices(by, list(BY))))
    _check_names(listed)
    asked = [*listed, base] if base is not None and str(base) not in map(str, listed) else listed
    inputs = {str(model): opened for model, opened in zip(asked, open_inputs(asked), strict=True)}
    described = tuple(describe(inputs[str(model)], by) for model in listed)
    root, warnings = _root(listed, base, inputs)
    experts = [inputs[str(model)] for model in listed if root is not None and inputs[str(model)] is not root]
    if root is None or not experts:
        return Inspection(described, None, warnings)
    from mixmerge.inspect.comparison import compare

    comparison = compare(root, experts, by=by, threads=threads or cores(), progress=progress)
    if comparison.skipped:
        first = comparison.skipped[0]
        warnings += (
            f"{len(comparison.skipped)} tensors are not compared, such as {first.name} ({first.reason})",
        )
    return Inspection(described, comparison, warnings)


def _check_names(models: Sequence[str | Path | Reference]) -> None:
    names = [str(model) for model in models]
    if not names:
        raise MixmergeError(Fault("models", "none is given", "A model folder, a hub id or MODEL+ADAPTER"))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MixmergeError(Fault("models", f"{', '.join(twice)} is given twice"))


def _root(
    models: Sequence[str | Path | Reference],
    base: str | Path | Reference | None,
    inputs: dict[str, Input],
) -> tuple[Input | None, tuple[str, ...]]:
    """What to compare with, and what to say about the choice."""
    if base is not None:
        return inputs[str(base)], ()
    if len(models) < 2:
        return None, ()
    opened = [inputs[str(model)] for model in models]
    shared = {str(model.checkpoint.path) for model in opened}
    if len(shared) == 1 and all(model.adapter for model in opened):
        checkpoint = opened[0].checkpoint
        return Input(checkpoint.name, checkpoint, None, {}), ()
    said = f"no base is given: the others are compared with the first model, {opened[0].name}"
    return opened[0], (said,)
