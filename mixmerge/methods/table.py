"""The table of merge methods in the README, made from the rows of ``METHODS``."""

from __future__ import annotations

from collections.abc import Mapping

from mixmerge.methods import ANY, METHODS, REQUIRED, Method, Parameter

_HEAD = ("merge_method", "what it does", "base_model", "models", "parameters = default", "source")
_BASE = {"required": "required", "input": "one more model"}


def _default(parameter: Parameter) -> str:
    value = parameter.default
    if value == REQUIRED:
        return f"**`{parameter.name}`**"
    if value is None:
        return f"`{parameter.name}`"
    shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
    return f"`{parameter.name}` = {shown}"


def _count(method: Method) -> str:
    least, most = method.inputs
    if least == most:
        return str(least)
    return f"{least} or more" if most == ANY else f"{least} to {most}"


def _row(method: Method) -> tuple[str, ...]:
    parameters = ", ".join(_default(parameter) for parameter in method.parameters)
    base = _BASE[method.base]
    return (f"`{method.name}`", method.summary, base, _count(method), parameters, method.paper)


def markdown(methods: Mapping[str, Method] = METHODS) -> str:
    """A Markdown table, one line per method in the order of the registry; required parameters are bold.

    Args:
        methods: rows by name.

    Returns:
        The table without a final line break.
    """
    rows = [_HEAD, tuple("---" for _ in _HEAD), *(_row(method) for method in methods.values())]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
