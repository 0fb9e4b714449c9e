"""What the rows of the table are written with: numbers, choices, and the parameters that families share."""

from __future__ import annotations

from typing import Literal

from mixmerge.methods.records import ALL, REQUIRED, Parameter, Value

_MOST = float("inf")


def number(
    name: str,
    default: Value,
    doc: str,
    low: float = -_MOST,
    high: float = _MOST,
    *,
    per: Literal["input", "expert", "merge"] = "merge",
    constant: bool = False,
) -> Parameter:
    """A number: arguments as those of ``Parameter``."""
    return Parameter(name, "number", per, default, doc, low, high, constant=constant)


def one_task() -> Parameter:
    """``task``."""
    doc = f"position of the expert the model is for, from 0; {ALL}: a mask for each"
    return Parameter(
        "task", "number", "merge", REQUIRED, doc, 0.0, choices=(ALL,), constant=True, position=True
    )


def one_part() -> Parameter:
    """``part``."""
    doc = "position of one expert, from 0: the model of its own processed delta, alone and unscaled"
    return Parameter("part", "number", "merge", None, doc, 0.0, constant=True, position=True)


def whole(
    name: str,
    default: int | None,
    doc: str,
    low: int = 0,
    high: float = _MOST,
    *,
    constant: bool = False,
    learning: bool = False,
) -> Parameter:
    """A whole number for the whole merge."""
    return Parameter(
        name,
        "number",
        "merge",
        default,
        doc,
        low,
        high,
        constant=constant,
        whole=True,
        learning=learning,
    )


def choice(
    name: str, default: Value, doc: str, *choices: str, constant: bool = False, learning: bool = False
) -> Parameter:
    """One of the words ``choices`` for the whole merge."""
    return Parameter(
        name, "choice", "merge", default, doc, choices=choices, constant=constant, learning=learning
    )


def flag(name: str, default: bool, doc: str, *, constant: bool = False, learning: bool = False) -> Parameter:
    """True or false for the whole merge."""
    return Parameter(name, "bool", "merge", default, doc, constant=constant, learning=learning)


def merged_by(default: float) -> Parameter:
    """``lambda``."""
    return number("lambda", default, "factor on the merged delta")


def tolerance() -> Parameter:
    """``tolerance`` of the spectral methods."""
    doc = "share of the largest singular value below which one is rounding; 0 keeps all, as published"
    return number("tolerance", None, doc, 0.0, 0.99)


def tables(rest: str) -> Parameter:
    """``tables``: of what ``rest`` others get, or spectral."""
    doc = f"embeddings and heads over a vocabulary: {rest} of what other tensors get, or as matrices"
    return choice("tables", rest, doc, rest, "spectral")


def kept(
    default: float, doc: str = "share of each delta that is kept", *, constant: bool = False
) -> Parameter:
    """``density``."""
    return number("density", default, doc, 0.0, 1.0, per="expert", constant=constant)


def threshold_scope(default: Literal["tensor", "model"], doc: str) -> Parameter:
    """``scope``."""
    return choice("scope", default, doc, "tensor", "model", constant=True)
