"""What a recipe is once it is read: frozen data in one canonical form, and its stable text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from mixmerge.document import Scalar
from mixmerge.errors import Fault, RecipeError
from mixmerge.methods import METHODS, Method
from mixmerge.recipe.calibration import Calibration
from mixmerge.recipe.gate import NONE, GateBlock
from mixmerge.recipe.references import ModelRef
from mixmerge.registry import find

MAX_SEED = 2**64 - 1
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Conditional:
    """The value of a parameter for the tensors whose name contains ``filter``.

    Args:
        filter: a plain substring; None for every tensor.
        value: one value, or the anchors of a gradient over the layers. Empty: not set here, so the next
            level (global, then default) decides.
    """

    filter: str | None
    value: tuple[Scalar, ...]


Setting = tuple[Conditional, ...]  # the first one that matches a tensor wins


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Frozen):
    """One entry of ``models``: the model, and its own values of the method's parameters."""

    model: ModelRef
    parameters: dict[str, Setting] = Field(default_factory=dict)


class Shared(_Frozen):
    """How the shared part of a method with a bank is merged: any method, and its parameters for all experts."""

    merge_method: str
    parameters: dict[str, Setting] = Field(default_factory=dict)


class Output(_Frozen):
    """How the result is written. ``shard_size`` is in bytes."""

    shard_size: int = Field(default=5_000_000_000, ge=1, lt=2**63)


class Recipe(_Frozen):
    """A merge, fully spelled out: no parameters without effect, every setting a tuple of conditionals.

    ``tuned_on`` names rows that the values were chosen by (``Row.known_by``): an evaluation must not meet them again.
    Of a method with a bank the experts' own parameters are those of ``shared``, and no ``gate`` is ``gate: none``;
    other methods have neither.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: ModelRef | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    output: Output = Output()
    calibration: Calibration | None = None
    coefficients: str | None = None
    tuned_on: tuple[str, ...] = ()
    shared: Shared | None = None
    gate: GateBlock | None = None


@dataclass(frozen=True)
class Parsed:
    """What reading a recipe gave.

    Args:
        recipe: None if there is any fault.
        faults: everything that is wrong.
        warnings: what has no effect, one line each.
        text: the source, verbatim.
        refs: (path in the YAML, model) for every reference that could be read, faults or not.
        calibration: the block, faults or not; None if there is none, or the method does not use it.
    """

    recipe: Recipe | None
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    text: str
    refs: tuple[tuple[str, ModelRef], ...]
    calibration: Calibration | None = None

    def require(self) -> Recipe:
        """The recipe.

        Raises:
            RecipeError: with every fault, if there are any.
        """
        if self.recipe is None:
            raise RecipeError(self.faults)
        return self.recipe


def inputs(recipe: Recipe, method: Method | None = None) -> tuple[ModelEntry, ...]:
    """The experts of a merge in declared order; ``entry`` of ``resolve`` counts in it.

    Where the method requires a base, the base is left out. Otherwise a base that is not listed is appended as
    one more input, as mergekit does.

    Args:
        recipe: the recipe.
        method: its method's row, if at hand; looked up otherwise.
    """
    method = method or METHODS.get(recipe.merge_method) or find("method", recipe.merge_method)
    base = recipe.base_model
    if method.base == "required":
        return tuple(entry for entry in recipe.models if entry.model != base)
    if base is None or any(entry.model == base for entry in recipe.models):
        return recipe.models
    return (*recipe.models, ModelEntry(model=base))


def _plain_values(values: tuple[Scalar, ...]) -> Scalar | list[Scalar]:
    return values[0] if len(values) == 1 else list(values)


def _plain_setting(setting: Setting) -> Any:
    if len(setting) == 1 and setting[0].filter is None:
        return _plain_values(setting[0].value)
    return [
        {"value": _plain_values(one.value)}
        if one.filter is None
        else {"filter": one.filter, "value": _plain_values(one.value)}
        for one in setting
    ]


def _plain_parameters(parameters: dict[str, Setting]) -> dict[str, Any]:
    return {name: _plain_setting(parameters[name]) for name in sorted(parameters)}


def canonical(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain lists, mappings and scalars (JSON and YAML), the same for every spelling of it.

    Parameters are sorted by name, numbers are floats, values without a filter are written in the short form;
    what is not set is left out, except ``seed`` and ``output``, and what stands in ``calibration``.
    """
    plain: dict[str, Any] = {"merge_method": recipe.merge_method}
    if recipe.base_model is not None:
        plain["base_model"] = recipe.base_model.canonical()
    plain["models"] = []
    for entry in recipe.models:
        model: dict[str, Any] = {"model": entry.model.canonical()}
        if entry.parameters:
            model["parameters"] = _plain_parameters(entry.parameters)
        plain["models"].append(model)
    if recipe.parameters:
        plain["parameters"] = _plain_parameters(recipe.parameters)
    if recipe.shared is not None:
        plain["shared"] = {"merge_method": recipe.shared.merge_method}
        if recipe.shared.parameters:
            plain["shared"]["parameters"] = _plain_parameters(recipe.shared.parameters)
        plain["gate"] = NONE if recipe.gate is None else recipe.gate.canonical()
    for name in ("dtype", "out_dtype"):
        if getattr(recipe, name) is not None:
            plain[name] = getattr(recipe, name)
    plain["seed"] = recipe.seed
    plain["output"] = {"shard_size": recipe.output.shard_size}
    if recipe.calibration is not None:
        plain["calibration"] = recipe.calibration.canonical()
    if recipe.coefficients is not None:
        plain["coefficients"] = recipe.coefficients
    if recipe.tuned_on:
        plain["tuned_on"] = list(recipe.tuned_on)
    return plain


def to_yaml(plain: Any) -> str:
    """YAML text of plain data; the pure Python writer, so that the bytes do not depend on the install."""
    text: str = yaml.dump(
        plain,
        Dumper=yaml.SafeDumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**9,
        default_flow_style=None,
    )
    return text


def dump(recipe: Recipe) -> str:
    """The canonical form as YAML: stable, fit for hashing; ``parse`` reads the same recipe back."""
    return to_yaml(canonical(recipe))


_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,9}))?\s*([kmgt]?i?b?)", re.IGNORECASE)
_UNITS = {
    **{"": 1, "k": 10**3, "m": 10**6, "b": 10**9},  # mergekit's: 5B is five billion bytes
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"g": 10**9, "t": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
}


def size_in_bytes(written: str) -> int | None:
    """Bytes of ``5GB``, ``500MB``, ``1.5GiB`` or mergekit's ``5B`` and ``200M``; None if it is no size."""
    match = _SIZE.fullmatch(written.strip())
    if match is None or match[3].lower() not in _UNITS:
        return None
    fraction = match[2] or ""
    return int(int(match[1] + fraction) * _UNITS[match[3].lower()] // 10 ** len(fraction))
