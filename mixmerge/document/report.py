"""A node of a document that knows where it is written, and the list of everything wrong with the document."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from operator import itemgetter

from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Scalar = bool | float | str
# What YAML can hold once aliases are expanded. Integers stay integers here: a seed needs all its digits.
Data = None | bool | int | float | str | tuple["Node", ...] | dict[str, "Node"]

MAX_FAULTS = 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Kind:
    """What messages say of a document.

    Args:
        noun: what it is, such as ``recipe``.
        needs: what it cannot be without: said of an empty one.
        several, instead: said of a file with several YAML documents, and what to do then.
    """

    noun: str
    needs: str
    several: str = "files with several YAML documents are not supported"
    instead: str = "Write one file for each"


@dataclass(frozen=True, slots=True)
class Node:
    """One value of the document.

    Args:
        path: where it is, as ``models[1].parameters.weight``; for the whole document its name.
        line: the line of its key (or of the value itself in a list), from 1; None if it came from Python.
        value: a scalar, a tuple of nodes or a mapping of nodes.
    """

    path: str
    line: int | None
    value: Data

    @property
    def where(self) -> str:
        return self.path if self.line is None else f"{self.path} (line {self.line})"


class Report:
    """Collects faults and warnings while a document is read; gives them back in the order of their lines."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._faults: list[tuple[float, Fault]] = []
        self._warnings: list[tuple[float, Fault]] = []
        self._more = 0

    @property
    def full(self) -> bool:
        """No more faults are kept: time to stop looking."""
        return len(self._faults) >= MAX_FAULTS

    @property
    def faulty(self) -> bool:
        return bool(self._faults)

    def fault(self, at: Node | str, what: str, allowed: str = "", run: str = "") -> None:
        if self.full:
            self._more += 1
        else:
            self._faults.append(_located(at, what, allowed, run))

    def warn(self, at: Node | str, what: str, allowed: str = "", run: str = "") -> None:
        if len(self._warnings) < MAX_FAULTS:
            self._warnings.append(_located(at, what, allowed, run))

    def take(self, error: MixmergeError, at: Node) -> None:
        for fault in error.faults:
            self.fault(at, fault.what, fault.allowed, fault.run)

    def faults(self, name: str) -> tuple[Fault, ...]:
        """Every fault; ``name`` is what the document is called."""
        rest = [Fault(name, f"{self._more} more faults are not shown")] if self._more else []
        return (*(fault for _, fault in sorted(self._faults, key=itemgetter(0))), *rest)

    def warnings(self) -> tuple[str, ...]:
        return tuple(str(warning) for _, warning in sorted(self._warnings, key=itemgetter(0)))


def _located(at: Node | str, what: str, allowed: str, run: str) -> tuple[float, Fault]:
    if isinstance(at, str):
        return math.inf, Fault(at, what, allowed, run)
    return math.inf if at.line is None else at.line, Fault(at.where, what, allowed, run)


def show(value: object) -> str:
    """A value as an error message quotes it: YAML words for YAML things, and never a page of it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value[:100]) if isinstance(value, str) else number(value)
    return text if len(text) <= 60 else text[:57] + "..."


def number(value: object) -> str:
    """A number in a message: 1 rather than 1.0, and 10^5000 without its digits."""
    if isinstance(value, float):
        return f"{value:g}" if value == float(f"{value:g}") else repr(value)
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return str(value)


def read_mapping(node: Node, report: Report, what: str) -> dict[str, Node]:
    """The entries of a mapping; empty for an empty value (``parameters:`` with nothing below it)."""
    if isinstance(node.value, dict):
        return node.value
    if node.value is not None:
        report.fault(node, f"expected a mapping of {what}, got {show(node.value)}")
    return {}


def read_text(node: Node, report: Report, what: str) -> str | None:
    """A piece of text that can be a name or a path."""
    value = node.value
    if not isinstance(value, str):
        quote = "Write it in quotes" if isinstance(value, bool | int | float) else ""
        report.fault(node, f"expected {what}, got {show(value)}", run=quote)
        return None
    if _CONTROL.search(value):
        report.fault(node, f"expected {what}, got text with control characters")
        return None
    return value


def given(entries: dict[str, Node], key: str) -> Node | None:
    """The node of a key that is there and not null."""
    node = entries.get(key)
    return None if node is None or node.value is None else node


def unknown_keys(entries: dict[str, Node], known: list[str], report: Report) -> None:
    """One fault for each key that is not known, with the nearest one that is."""
    for name, node in entries.items():
        if name not in known:
            if report.full:
                return
            report.fault(node, f"unknown key {show(name)}", choices(name, known))
