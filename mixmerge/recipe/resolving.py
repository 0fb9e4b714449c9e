"""The values of the parameters for one tensor: precedence, filters and gradients over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixmerge.document import Scalar
from mixmerge.errors import Fault, RecipeError
from mixmerge.methods import REQUIRED, Method, Parameter, Value
from mixmerge.recipe.schema import ModelEntry, Recipe, Setting, inputs
from mixmerge.recipe.settings import constant

ZERO_SUM = 1e-8


@dataclass(frozen=True)
class TensorValues:
    """All parameters of one tensor.

    Args:
        merge: the values that hold for all inputs together.
        entries: for each of ``inputs(recipe)``, in that order, its own values.
    """

    merge: dict[str, Value]
    entries: tuple[dict[str, Value], ...]


def layer_position(layer: int | None, layers: int) -> float:
    """Where a tensor is on a gradient, by mergekit's rule.

    Args:
        layer: index of its layer, from 0; None for tensors outside the layers (embeddings, final norm, head).
        layers: how many layers there are.

    Returns:
        0 for the first layer and for tensors outside, 1 for the last layer; an only layer counts as last.
    """
    if layer is None:
        return 0.0
    return layer / (layers - 1) if layers > 1 else 1.0


def interpolate(anchors: Sequence[Scalar], position: float, *, whole: bool = False) -> Scalar | None:
    """The value of a gradient: piecewise linear for numbers, a step function for words, booleans and whole numbers.

    Args:
        anchors: k values, evenly spread over [0, 1]; none gives None.
        position: in [0, 1]; steps take anchor ``floor(position * (k - 1))``.
        whole: numbers are whole numbers.
    """
    if len(anchors) < 2:
        return anchors[0] if anchors else None
    scaled = position * (len(anchors) - 1)
    left = int(scaled)
    before, after = anchors[left], anchors[min(left + 1, len(anchors) - 1)]
    if whole or isinstance(before, bool | str) or isinstance(after, bool | str):
        return before
    fraction = scaled - left
    return (1 - fraction) * before + fraction * after


def _evaluate(
    parameters: Mapping[str, Setting], parameter: Parameter, name: str, position: float
) -> Scalar | None:
    for one in parameters.get(parameter.name, ()):
        if one.filter is None or one.filter in name:
            return interpolate(one.value, position, whole=parameter.whole)
    return None


def resolve_tensor(recipe: Recipe, method: Method, *, name: str, position: float) -> TensorValues:
    """Every parameter of one tensor.

    Args:
        recipe: the recipe.
        method: the row of its ``merge_method``.
        name: the tensor's name; filters are substrings of it.
        position: in [0, 1], see ``layer_position``.

    Raises:
        RecipeError: a required parameter has no value for this tensor, ``agg`` contradicts ``normalize``, or
            a normalised average has weights that sum to zero here.
    """
    faults: list[Fault] = []
    entries = inputs(recipe, method)
    merge = _merge_values(recipe, method, name, position, faults)
    values = tuple(_entry_values(recipe, method, entry, name, position, faults) for entry in entries)
    if method.takes == "experts" and method.parameter("weight") and merge.get("normalize") and not faults:
        total = sum(float(value.get("weight") or 0.0) for value in values)
        if abs(total) < ZERO_SUM:
            faults.append(zero_sum("parameters.weight", f" for tensor {name}"))
    if faults:
        raise RecipeError(faults)
    return TensorValues(merge, values)


def resolve(
    recipe: Recipe, method: Method, *, entry: int | None, name: str, position: float
) -> dict[str, Value]:
    """The parameters of one tensor that one input has, or those all inputs share.

    Args:
        recipe, method, name, position: as in ``resolve_tensor``.
        entry: index into ``inputs(recipe)``; None for the shared ones. Where ``agg`` is given, ``normalize``
            in the result follows it.

    Raises:
        RecipeError: a required parameter has no value for this tensor, or ``agg`` contradicts ``normalize``.
    """
    faults: list[Fault] = []
    if entry is None:
        values = _merge_values(recipe, method, name, position, faults)
    else:
        values = _entry_values(recipe, method, inputs(recipe, method)[entry], name, position, faults)
    if faults:
        raise RecipeError(faults)
    return values


def _merge_values(
    recipe: Recipe, method: Method, name: str, position: float, faults: list[Fault]
) -> dict[str, Value]:
    values: dict[str, Value] = {}
    written: dict[str, Scalar] = {}
    for parameter in method.parameters:
        if parameter.per != "merge":
            continue
        value = _evaluate(recipe.parameters, parameter, name, position)
        if value is not None:
            written[parameter.name] = value
        elif parameter.default == REQUIRED:
            faults.append(_missing("parameters", parameter, name))
        values[parameter.name] = parameter.default if value is None else value
    agg = written.get("agg")
    if agg is not None and "normalize" in values:
        if "normalize" in written and written["normalize"] != (agg == "mean"):
            faults.append(contradiction("parameters.agg", str(agg), f" for tensor {name}"))
        values["normalize"] = agg == "mean"
    return values


def _entry_values(
    recipe: Recipe, method: Method, entry: ModelEntry, name: str, position: float, faults: list[Fault]
) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for parameter in method.parameters:
        if parameter.per == "merge":
            continue
        value = _evaluate(entry.parameters, parameter, name, position)
        if value is None:
            value = _evaluate(recipe.parameters, parameter, name, position)
        replaced = parameter.name == "weight" and recipe.coefficients is not None
        if value is None and replaced and parameter.default == REQUIRED:
            value = 0.0  # the plan puts in what was learned
        if value is None and parameter.default == REQUIRED:
            at = next((at for at, listed in enumerate(recipe.models) if listed.model == entry.model), None)
            where = "base_model" if at is None else f"models[{at}].parameters"
            faults.append(_missing(where, parameter, name))
        values[parameter.name] = parameter.default if value is None else value
    return values


def _missing(where: str, parameter: Parameter, name: str) -> Fault:
    what = f"no {parameter.name} for tensor {name}: no filter matches it"
    return Fault(f"{where}.{parameter.name}", what, run="Add an entry without filter, last")


def chosen_expert(recipe: Recipe, method: Method) -> int | None:
    """The expert whose model a merge makes, by its place among ``inputs(recipe)``; None: it makes one of them all."""
    for parameter in method.parameters:
        if not parameter.position:
            continue
        value = constant(recipe.parameters.get(parameter.name, ()))
        if value is not None and not isinstance(value, str):
            return int(value)
    return None


def zero_sum(where: str, which: str = "") -> Fault:
    """The fault of weights that cannot be normalised."""
    return Fault(
        where, f"the weights sum to zero{which}, and normalize divides by the sum", run="Set normalize: false"
    )


def contradiction(where: str, agg: str, which: str = "") -> Fault:
    """The fault of two parameters that say opposite things."""
    implied = "true" if agg == "mean" else "false"
    return Fault(
        where, f"agg: {agg} means normalize: {implied}, and normalize says otherwise{which}", run="Drop one"
    )
