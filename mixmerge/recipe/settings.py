"""Values of parameters as a recipe writes them: scalar, gradient, or a list with filters."""

from __future__ import annotations

import math

from mixmerge.document import Node, Report, Scalar, number, read_text, show
from mixmerge.methods import Parameter
from mixmerge.recipe.schema import Conditional, Setting

_FLOAT32_MAX = 3.4028234663852886e38
_MANY = 500
_TRUE = ("true", "t", "yes", "y", "on", "1")
_FALSE = ("false", "f", "no", "n", "off", "0")


def read_setting(node: Node, parameter: Parameter, report: Report) -> Setting | None:
    """One setting in canonical form: () if it says nothing (an empty list), None if it is faulty."""
    value = node.value
    items = value if isinstance(value, tuple) else ()
    if isinstance(value, dict):
        conditionals = [_conditional(node, value, parameter, report)]
    elif any(isinstance(item.value, dict) for item in items):
        conditionals = [_list_item(item, parameter, report) for item in items]
    else:
        values = _values(node, parameter, report)
        conditionals = [None if values is None else Conditional(None, values)]
    setting = tuple(one for one in conditionals if one is not None)
    if len(setting) < len(conditionals):
        return None
    if parameter.constant and not is_constant(setting):
        report.fault(
            node,
            f"{parameter.name} may not change from tensor to tensor",
            run="Give it one value, without filter or gradient",
        )
        return None
    _shadowed(node, setting, report)
    return () if setting == (Conditional(None, ()),) else setting


def _list_item(node: Node, parameter: Parameter, report: Report) -> Conditional | None:
    if isinstance(node.value, dict):
        return _conditional(node, node.value, parameter, report)
    report.fault(
        node,
        f"expected {{filter: ..., value: ...}} like its neighbours, got {show(node.value)}",
        run="Add value:",
    )
    return None


def _conditional(
    node: Node, entries: dict[str, Node], parameter: Parameter, report: Report
) -> Conditional | None:
    unknown = [name for name in entries if name not in ("filter", "value")]
    for name in unknown:
        report.fault(entries[name], f"unknown key {show(name)}", "Known: filter, value")
    wanted = entries.get("filter")
    matches: str | None = None
    if wanted is not None and wanted.value is not None:
        matches = read_text(wanted, report, "a piece of a tensor's name")
        if matches is None:
            return None
    if "value" not in entries:
        report.fault(node, "the key value is missing", "It is written {filter: ..., value: ...}")
        return None
    values = _values(entries["value"], parameter, report)
    if values is None or unknown:
        return None
    return Conditional(None if matches in ("", "*") else matches, values)


def _values(node: Node, parameter: Parameter, report: Report) -> tuple[Scalar, ...] | None:
    items = node.value if isinstance(node.value, tuple) else (node,)
    values = tuple(_scalar(item, parameter, report) for item in items)
    return None if None in values else tuple(value for value in values if value is not None)


def _scalar(node: Node, parameter: Parameter, report: Report) -> Scalar | None:
    """One value, converted to the type the parameter declares (YAML 1.1 reads 1e-5 as text)."""
    value = node.value
    if value is None:
        report.fault(node, f"{parameter.name} has no value", run="Give it one, or remove the key")
        return None
    if isinstance(value, tuple | dict):
        report.fault(node, f"expected {_KINDS[parameter.kind]}, got {show(value)}")
        return None
    if parameter.kind == "number" and not (isinstance(value, str) and value in parameter.choices):
        return _number(node, value, parameter, report)
    if parameter.kind == "bool":
        word = str(int(value) if value in (0, 1) else value).strip().lower()
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
    elif isinstance(value, str) and parameter.knows(value):
        return value
    elif isinstance(value, int) and not isinstance(value, bool) and parameter.knows(str(value)):
        return str(value)
    known = "Known: " + ", ".join(parameter.words) if parameter.choices else ""
    report.fault(node, f"expected {_KINDS[parameter.kind]}, got {show(value)}", known)
    return None


_KINDS = {"number": "a number", "bool": "true or false", "choice": "one of the known words"}


def _number(node: Node, value: Scalar | int, parameter: Parameter, report: Report) -> float | None:
    if isinstance(value, bool):
        report.fault(node, f"expected a number, got {show(value)}")
        return None
    try:
        result = float(value)
    except ValueError:
        report.fault(node, f"expected a number, got {show(value)}")
        return None
    except OverflowError:
        result = math.inf
    if math.isnan(result):
        report.fault(node, f"{parameter.name} is not a number (NaN)")
    elif abs(result) > _FLOAT32_MAX:
        report.fault(node, f"{parameter.name} is infinite, or too large for float32 arithmetic")
    elif parameter.whole and not result.is_integer():
        report.fault(node, f"{number(result)} is no whole number", _range(parameter))
    elif not parameter.low <= result <= parameter.high:
        report.fault(node, f"{number(result)} is out of range", _range(parameter))
    else:
        return result
    return None


def _range(parameter: Parameter) -> str:
    low, high = number(parameter.low), number(parameter.high)
    if parameter.high == math.inf:
        return f"{parameter.name} is at least {low}"
    if parameter.low == -math.inf:
        return f"{parameter.name} is at most {high}"
    return f"{parameter.name} is between {low} and {high}"


def _shadowed(node: Node, setting: Setting, report: Report) -> None:
    """Warn about conditionals that no tensor reaches because an earlier one takes all of theirs."""
    if len(setting) > _MANY:
        return  # written by a program; every pair would be compared
    earlier: list[str] = []
    for at, one in enumerate(setting):
        taken = next((word for word in earlier if word in (one.filter or "")), None)
        if taken is not None:
            by = f"the filter {show(taken)}" if taken else "the entry without filter"
            report.warn(
                Node(f"{node.path}[{at}]", node.line, None), f"never used: {by} before it matches first"
            )
        else:
            earlier.append(one.filter or "")


def is_constant(setting: Setting) -> bool:
    """Whether it gives every tensor the same value."""
    return len(setting) == 1 and setting[0].filter is None and len(setting[0].value) <= 1


def constant(setting: Setting) -> Scalar | None:
    """The one value it gives to every tensor, or None if it may depend on the tensor."""
    return setting[0].value[0] if is_constant(setting) and setting[0].value else None
