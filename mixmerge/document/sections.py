"""A section of a YAML document as a strict model, what is wrong said with path and line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mixmerge.document.report import Node, Report, read_mapping, show, unknown_keys
from mixmerge.document.tree import to_data

M = TypeVar("M", bound=BaseModel)
# YAML 1.1 reads 1e-5 as text: it wants a dot and a sign.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Strict(BaseModel):
    """A section of the YAML: one key for each field, of exactly its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_section(
    node: Node, model: type[M], report: Report, *, what: str, ready: Mapping[str, Any] | None = None
) -> M | None:
    """The model, or None if anything is wrong (the report says what).

    Args:
        node: a mapping; an empty value is an empty mapping.
        model: one field for each key.
        report: gets unknown keys, missing ones, and values that are not as they should be.
        what: the section holds, for a message.
        ready: values of fields that were read before.
    """
    entries, ready = read_mapping(node, report, what), ready or {}
    if node.value is not None and not isinstance(node.value, dict):
        return None
    unknown_keys(entries, list(model.model_fields), report)
    inner = {name: one for name, one in _sections(entries, model).items() if name not in ready}
    read = {
        name: read_section(entries[name], one, report, what=f"keys of {name}") for name, one in inner.items()
    }
    data = {name: child for name, child in plain(entries, model).items() if name not in (*ready, *read)}
    wrong = [name for name, one in read.items() if one is None]
    found: M | None = None
    try:
        found = model.model_validate(
            {**data, **{name: one for name, one in read.items() if one is not None}, **ready}
        )
    except ValidationError as error:
        for one in error.errors():
            if not (one["type"] == "missing" and one["loc"][-1] in wrong):
                _say(one, node, report)
    return None if wrong else found


def _sections(entries: Mapping[str, Node], model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The keys that are sections of their own."""
    found = {}
    for name, child in entries.items():
        kind = model.model_fields[name].annotation if name in model.model_fields else None
        if child.value is not None and isinstance(kind, type) and issubclass(kind, BaseModel):
            found[name] = kind
    return found


def plain(entries: Mapping[str, Node], model: type[BaseModel]) -> dict[str, Any]:
    """What the keys of the model are set to; those without a value count as not there."""
    return {
        name: _number(to_data(child), model.model_fields[name].annotation)
        for name, child in entries.items()
        if name in model.model_fields and child.value is not None
    }


def _number(value: Any, annotation: Any) -> Any:
    kinds = (annotation, *get_args(annotation))
    written = isinstance(value, str) and _EXPONENT.fullmatch(value.strip()) is not None
    return float(value) if written and float in kinds and str not in kinds else value


def _say(error: Any, node: Node, report: Report) -> None:
    if error["type"] == "missing":
        report.fault(node, f"the key {error['loc'][-1]} is missing")
        return
    at = _at(node, error["loc"])
    if error["type"] == "value_error":  # a rule of the model's own, which says it in its own words
        report.fault(at, str(error["ctx"]["error"]))
        return
    wanted = error["msg"].removeprefix("Input should ").removeprefix("be ")
    if wanted.startswith(("greater", "less")):
        wanted = f"a number {wanted}"
    if error["type"] == "string_pattern_mismatch":
        wanted = "an address that begins with http:// or https://"
    report.fault(at, f"expected {wanted}, got {show(at.value)}")


def _at(node: Node, location: Iterable[str | int]) -> Node:
    """The node a fault is about, or the nearest one around it."""
    for part in location:
        value = node.value
        inner = value.get(str(part)) if isinstance(value, dict) else None
        if isinstance(value, tuple) and isinstance(part, int):
            inner = value[part]
        if inner is None:
            break
        node = inner
    return node


def arguments_of(made: type[Any], *, name: str) -> type[BaseModel]:
    """A strict model of the keyword arguments of a class."""
    parameters = inspect.signature(made, eval_str=True).parameters.values()
    fields: dict[str, Any] = {
        one.name: (one.annotation, ... if one.default is inspect.Parameter.empty else one.default)
        for one in parameters
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return create_model(name, __base__=Strict, **fields)
