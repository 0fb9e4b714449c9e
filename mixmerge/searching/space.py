"""Which parameters of a recipe are searched, between which bounds, and how finely. Imports no optimiser."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mixmerge.document import Kind, Node, Report, given, load, read_file, read_mapping, show, unknown_keys
from mixmerge.document.sections import Strict, read_section
from mixmerge.errors import Fault, MixmergeError
from mixmerge.methods import Method, Parameter
from mixmerge.recipe import Recipe, canonical, inputs
from mixmerge.registry import choices

SPACE = Kind("search space", needs="It needs parameters")
Optimizer = Literal["cma", "ngopt", "random"]
Value = float | str | bool


class Dimension(Strict):
    """The values that a parameter may take.

    Args:
        low, high: bounds of a number, both included.
        choices: or the values to choose from, two or more.
        per: one value for the whole ``merge``, or one for each ``expert``.
        anchors: values over the depth of the model, 1 to 1000, as a recipe's gradient; ``layers``: one for each layer.
        log: search the logarithm of a positive number.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[Value, ...] | None = Field(default=None, strict=False)
    per: Literal["merge", "expert"] = "merge"
    anchors: int | Literal["layers"] = 1
    log: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("be choices, or low and high, not both")
            if len(set(self.choices)) < 2:
                raise ValueError("have two different choices or more")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("have a low below its high, or choices")
        elif self.log and self.low <= 0:
            raise ValueError("have a low above 0 where the logarithm is searched")
        if isinstance(self.anchors, int) and not 1 <= self.anchors <= 1000:
            raise ValueError("have 1 to 1000 anchors")
        return self


class Settings(Strict):
    """How a space is searched.

    Args:
        optimizer: ``cma`` (CMA-ES, for numbers), ``ngopt`` (Nevergrad's choice by space and budget) or ``random``.
        budget: merges that are scored, the recipe as it is among them; 2 or more.
        seed: of the optimiser.
    """

    optimizer: Optimizer = "cma"
    budget: int = Field(default=50, ge=2, le=100_000)
    seed: int = Field(default=0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Space:
    """What is searched: dimensions by the name of their parameter, and how."""

    dimensions: Mapping[str, Dimension]
    settings: Settings

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every value spelled out."""
        return {
            "parameters": {name: one.model_dump(mode="json") for name, one in self.dimensions.items()},
            **self.settings.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Slot:
    """One value that is searched.

    Args:
        parameter: of the method.
        entry: position among the recipe's experts; None for all of them.
        anchor: position over the depth, from 0.
        dimension: what it may be.
    """

    parameter: str
    entry: int | None
    anchor: int
    dimension: Dimension

    @property
    def name(self) -> str:
        """``weight``, ``weight[1]`` or ``weight[1]@3``."""
        owner = "" if self.entry is None else f"[{self.entry}]"
        depth = "" if self.dimension.anchors == 1 else f"@{self.anchor}"
        return f"{self.parameter}{owner}{depth}"


def read_space(path: Path, method: Method) -> Space:
    """A space from its YAML file, held against the method whose parameters it names.

    Raises:
        MixmergeError: everything that is wrong with it, at once.
    """
    report = Report(SPACE)
    text = read_file(path, name=str(path), report=report)
    root = None if text is None else load(text, name=str(path), report=report)
    space = None
    if root is not None and isinstance(root.value, dict):
        space = _space(root.value, method, report)
    elif root is not None:
        report.fault(root, f"a search space is a mapping, got {show(root.value)}", SPACE.needs)
    faults = report.faults(str(path))
    if faults or space is None:
        raise MixmergeError(faults)
    return space


def _space(top: dict[str, Node], method: Method, report: Report) -> Space | None:
    unknown_keys(top, ["parameters", *Settings.model_fields], report)
    node = given(top, "parameters")
    if node is None or node.value in ({}, ()):
        report.fault("parameters", "nothing is searched", run="Add parameters:, with NAME: {low: 0, high: 1}")
        return None
    dimensions = {}
    for name, child in read_mapping(node, report, "parameters of the method").items():
        parameter = method.parameter(name)
        if parameter is None:
            known = choices(name, [one.name for one in method.parameters])
            report.fault(child, f"{method.name} has no parameter {show(name)}", known)
            continue
        dimension = read_section(child, Dimension, report, what="low and high, or choices")
        if dimension is not None:
            for fault in misfits(parameter, dimension, child.path):
                report.fault(child, fault.what, fault.allowed, fault.run)
            dimensions[name] = dimension
    rest = {key: child for key, child in top.items() if key != "parameters"}
    settings = read_section(Node("", None, rest), Settings, report, what="settings of the search")
    return None if settings is None else Space(dimensions, settings)


def misfits(parameter: Parameter, dimension: Dimension, where: str) -> list[Fault]:
    """In what a dimension does not fit its parameter."""
    faults = []
    if parameter.per == "merge" and dimension.per == "expert":
        faults.append(Fault(where, "it is one value for the whole merge", "per: merge"))
    if parameter.constant and dimension.anchors != 1:
        faults.append(Fault(where, "it is one value for the whole model", "anchors: 1"))
    if dimension.choices is None:
        if parameter.whole:
            faults.append(Fault(where, "it is a whole number", "choices: [...]"))
        elif parameter.kind != "number":
            faults.append(Fault(where, "it is no number", "choices: [...]"))
        elif (dimension.low or 0.0) < parameter.low or (dimension.high or 0.0) > parameter.high:
            bounds = f"{dimension.low:g} to {dimension.high:g}"
            faults.append(Fault(where, f"is {bounds}", f"{parameter.low:g} to {parameter.high:g}"))
        return faults
    for value in dimension.choices:
        if not _fits(parameter, value):
            allowed = {"bool": "true and false", "choice": " and ".join(parameter.words)}
            numbers = (
                f"{'whole ' if parameter.whole else ''}numbers from {parameter.low:g} to {parameter.high:g}"
            )
            faults.append(
                Fault(where, f"{show(value)} is no value of it", allowed.get(parameter.kind, numbers))
            )
    return faults


def _fits(parameter: Parameter, value: Value) -> bool:
    if parameter.kind == "bool":
        return isinstance(value, bool)
    if parameter.kind == "choice":
        return isinstance(value, str) and parameter.knows(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (parameter.whole and not float(value).is_integer()):
        return False
    return parameter.low <= float(value) <= parameter.high


def slots(space: Space, recipe: Recipe, *, layers: int) -> tuple[Slot, ...]:
    """Every value that is searched, in the order of the space, its experts and the depth.

    Args:
        space: the space.
        recipe: whose parameters they are.
        layers: of the model: what ``anchors: layers`` means, 1 or more.
    """
    found = []
    for name, dimension in space.dimensions.items():
        owners: Sequence[int | None] = [None] if dimension.per == "merge" else range(len(inputs(recipe)))
        depth = layers if dimension.anchors == "layers" else dimension.anchors
        found += [Slot(name, owner, at, dimension) for owner in owners for at in range(depth)]
    return tuple(found)


def with_values(recipe: Recipe, found: Sequence[Slot], values: Mapping[str, Value]) -> dict[str, Any]:
    """The recipe with these values, as plain data that a YAML file can hold.

    Args:
        recipe: the recipe.
        found: the slots.
        values: slot name -> value.
    """
    plain = copy.deepcopy(canonical(recipe))
    grouped: dict[tuple[str, int | None], list[Value]] = {}
    for slot in found:
        grouped.setdefault((slot.parameter, slot.entry), []).append(values[slot.name])
    refs = [entry.model.canonical() for entry in inputs(recipe)]
    listed = {id(model): refs.index(model["model"]) for model in plain["models"] if model["model"] in refs}
    for (name, owner), anchors in grouped.items():
        value = anchors[0] if len(anchors) == 1 else anchors
        if owner is None:
            plain.setdefault("parameters", {})[name] = value
        for model in plain["models"]:
            own = model.get("parameters", {})
            if owner is None:
                own.pop(name, None)  # a value of its own would hide the one that is searched
            elif listed.get(id(model)) == owner:
                model.setdefault("parameters", {})[name] = value
    for model in plain["models"]:
        if model.get("parameters") == {}:
            del model["parameters"]
    return plain
