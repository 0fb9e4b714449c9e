"""YAML text to a tree of nodes. Built on the parser's events: no tag can run code, no alias can explode."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml

from mixmerge.document.report import Data, Node, Report, show

MAX_BYTES = 10_000_000
MAX_NODES = 200_000
MAX_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
# Timestamps and YAML 1.1's other implicit types stay text: 2024-05-01 is a plausible folder name.
_TYPED = {_TAG + name: name for name in ("null", "bool", "int", "float")}
_PLAIN_TAGS = {"!", *(_TAG + name for name in ("str", "seq", "map", "null", "bool", "int", "float"))}


@dataclass(slots=True)
class _Raw:
    """A composed value before aliases are expanded; ``size`` and ``depth`` count as if they were."""

    kind: Literal["scalar", "list", "map"]
    line: int
    value: bool | int | float | str | None = None
    children: list[_Raw] = field(default_factory=list)
    merge: bool = False
    anchor: str | None = None
    size: int = 1
    depth: int = 1


def load(text: str, *, name: str, report: Report) -> Node | None:
    """The tree of one YAML document, or None when there is none to speak of (the report says why).

    Args:
        text: the document.
        name: what to call it in messages.
        report: gets syntax errors, duplicate keys, refused tags, aliases that explode.
    """
    text, noun = text.removeprefix("\ufeff"), report.kind.noun
    try:
        text.encode("utf-8")
        _bounded(len(text), MAX_BYTES, "characters", noun=noun, where=name)
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        raw = _Composer(name, report).compose(yaml.parse(text, Loader=loader))
    except _Refused as refused:
        report.fault(refused.at, refused.what, refused.allowed, refused.run)
        return None
    except yaml.YAMLError as error:
        _syntax(error, text, name, report)
        return None
    except UnicodeEncodeError:
        report.fault(name, f"the {noun} is not valid Unicode text")
        return None
    if raw is None or (raw.kind == "scalar" and raw.value is None):
        report.fault(name, f"the {noun} is empty", report.kind.needs)
        return None
    return replace(_expand(raw, "", raw.line, report), path=name, line=None)


class _Refused(Exception):  # noqa: N818
    """The document is not read any further; never leaves this file."""

    def __init__(self, at: Node, what: str, allowed: str = "", run: str = "") -> None:
        super().__init__(what)
        self.at, self.what, self.allowed, self.run = at, what, allowed, run


def _bounded(amount: int, limit: int, unit: str, *, noun: str, where: str, line: int | None = None) -> None:
    if amount > limit:
        raise _Refused(Node(where, line, None), f"the {noun} has too many {unit}", f"At most {limit:,}")


def _syntax(error: yaml.YAMLError, text: str, name: str, report: Report) -> None:
    mark: Any = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    if mark is None:
        report.fault(name, f"not valid YAML: {problem}")
        return
    lines = text.split("\n")
    tab = mark.line < len(lines) and lines[mark.line][mark.column : mark.column + 1] == "\t"
    where = f"{name} (line {mark.line + 1}, column {mark.column + 1})"
    report.fault(where, f"not valid YAML: {problem}", "YAML is indented with spaces, not tabs" if tab else "")


class _Composer:
    """Events to raw values, without recursion, so that nesting costs no stack."""

    def __init__(self, name: str, report: Report) -> None:
        self.name, self.report, self.kind = name, report, report.kind
        self.resolver: Any = yaml.resolver.Resolver()
        self.anchors: dict[str, _Raw] = {}
        self.open: list[_Raw] = []
        self.root: _Raw | None = None
        self.nodes = 0

    def compose(self, events: Iterator[Any]) -> _Raw | None:
        for event in events:
            self.nodes += 1
            self.bounded(self.nodes, 2 * MAX_NODES, "values", event.start_mark.line + 1)
            if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
                raise _Refused(self.at(event), self.kind.several, run=self.kind.instead)
            if isinstance(event, yaml.ScalarEvent):
                self.close(self.scalar(event))
            elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
                self.push(event)
            elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                self.close(self.open.pop())
            elif isinstance(event, yaml.AliasEvent):
                self.alias(event)
        return self.root

    def bounded(self, amount: int, limit: int, unit: str, line: int) -> None:
        _bounded(amount, limit, unit, noun=self.kind.noun, where=self.name, line=line)

    def at(self, event: Any) -> Node:
        return Node(self.name, event.start_mark.line + 1, None)

    def push(self, event: Any) -> None:
        self.tag(event)
        kind: Literal["list", "map"] = "list" if isinstance(event, yaml.SequenceStartEvent) else "map"
        self.open.append(_Raw(kind, event.start_mark.line + 1, anchor=event.anchor))
        self.check_depth(len(self.open), event)

    def close(self, raw: _Raw) -> None:
        """Hand a finished value to the list or mapping it stands in."""
        if raw.anchor is not None:
            self.anchors[raw.anchor] = raw
        if not self.open:
            self.root = raw
            return
        parent = self.open[-1]
        parent.children.append(raw)
        parent.size += raw.size
        parent.depth = max(parent.depth, raw.depth + 1)
        self.bounded(parent.size, MAX_NODES, "values, aliases expanded", raw.line)

    def alias(self, event: Any) -> None:
        target = self.anchors.get(event.anchor)
        if target is None:
            name = show("*" + event.anchor)
            raise _Refused(self.at(event), f"alias {name} refers to nothing defined before it")
        self.check_depth(len(self.open) + target.depth, event)
        self.close(replace(target, line=event.start_mark.line + 1, anchor=None))

    def check_depth(self, depth: int, event: Any) -> None:
        self.bounded(depth, MAX_DEPTH, "levels of nesting", event.start_mark.line + 1)

    def tag(self, event: Any) -> None:
        if event.tag is not None and event.tag not in _PLAIN_TAGS:
            self.report.fault(
                self.at(event), f"the YAML tag {_tag_name(event.tag)} is not allowed", "Plain values only"
            )

    def scalar(self, event: Any) -> _Raw:
        self.tag(event)
        raw = _Raw("scalar", event.start_mark.line + 1, event.value, anchor=event.anchor)
        tag = event.tag
        if tag is None and event.implicit[0]:
            tag = self.resolver.resolve(yaml.ScalarNode, event.value, (True, False))
            raw.merge = tag == _TAG + "merge"
        if tag in _TYPED:
            try:
                raw.value = _typed(_TYPED[tag], tag, event.value)
            except (ValueError, KeyError, IndexError):
                self.report.fault(self.at(event), f"{show(event.value)} is not a value of type {_TYPED[tag]}")
        return raw


def _tag_name(tag: str) -> str:
    return show("!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag)


def _typed(kind: str, tag: str, text: str) -> bool | int | float | None:
    node = yaml.ScalarNode(tag, text)
    constructor = yaml.constructor.SafeConstructor()
    value: bool | int | float | None = None
    if kind == "bool":
        value = constructor.construct_yaml_bool(node)
    elif kind == "int":
        value = constructor.construct_yaml_int(node)
    elif kind == "float":
        value = constructor.construct_yaml_float(node)
    return value


def _expand(raw: _Raw, path: str, line: int, report: Report) -> Node:
    """Aliases and merge keys replaced by what they stand for. Depth and size are already bounded."""
    if raw.kind == "scalar":
        return Node(path, line, raw.value)
    if raw.kind == "list":
        items = (_expand(child, f"{path}[{at}]", child.line, report) for at, child in enumerate(raw.children))
        return Node(path, line, tuple(items))
    entries: dict[str, Node] = {}
    for key, value in _pairs(raw, path, report):
        name = str(key.value)
        inner = f"{path}.{name}" if path else name
        if name in entries:
            first = entries[name].line
            report.fault(Node(inner, key.line, None), f"the key is given twice (first in line {first})")
            continue
        entries[name] = _expand(value, inner, key.line, report)
    for name, node in _merged(raw, path, report).items():
        entries.setdefault(name, node)
    return Node(path, line, entries)


def _pairs(raw: _Raw, path: str, report: Report) -> Iterator[tuple[_Raw, _Raw]]:
    for key, value in zip(raw.children[::2], raw.children[1::2], strict=True):
        if key.merge:
            continue
        if key.kind != "scalar" or not isinstance(key.value, str):
            at = Node(path or report.kind.noun, key.line, None)
            report.fault(at, f"a key must be text, got {_kind(key)}", run="Write it in quotes")
            continue
        yield key, value


def _kind(raw: _Raw) -> str:
    return show(raw.value) if raw.kind == "scalar" else {"list": "a list", "map": "a mapping"}[raw.kind]


def _merged(raw: _Raw, path: str, report: Report) -> dict[str, Node]:
    """What ``<<: *defaults`` brings in; of several, the first that has a key wins."""
    entries: dict[str, Node] = {}
    for key, value in zip(raw.children[::2], raw.children[1::2], strict=True):
        if not key.merge:
            continue
        for source in value.children if value.kind == "list" else [value]:
            if source.kind != "map":
                report.fault(Node(path or report.kind.noun, key.line, None), "<< needs a mapping to merge in")
                continue
            found = _expand(source, path, key.line, report).value
            for name, node in found.items() if isinstance(found, dict) else ():
                entries.setdefault(name, node)
    return entries


def _as_it_is(value: Any) -> Any:
    return value


def from_data(
    data: Mapping[Any, Any],
    *,
    name: str,
    report: Report,
    spelled: Callable[[Any], Any] = _as_it_is,
) -> Node | None:
    """The tree of a mapping that Python code made: the same limits as for text, and no lines.

    Args:
        data: the mapping.
        name: what to call it in messages.
        report: gets what cannot stand in a document.
        spelled: turns objects of our own into what a document would have in their place.
    """
    count, noun = 0, report.kind.noun

    def build(value: Any, path: str, depth: int) -> Node:
        nonlocal count
        count += 1
        _bounded(depth, MAX_DEPTH, "levels of nesting", noun=noun, where=path or name)
        _bounded(count, MAX_NODES, "values", noun=noun, where=name)
        value = spelled(value)
        if isinstance(value, Mapping):
            return Node(path, None, build_map(value, path, depth))
        if isinstance(value, list | tuple):
            items = (build(item, f"{path}[{at}]", depth + 1) for at, item in enumerate(value))
            return Node(path, None, tuple(items))
        return Node(path, None, _plain(value, path, report))

    def build_map(value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, item in value.items():
            if isinstance(key, str):
                entries[key] = build(item, f"{path}.{key}" if path else key, depth + 1)
            else:
                report.fault(path or name, f"a key must be text, got {show(key)}")
        return entries

    try:
        return replace(build(data, "", 1), path=name)
    except _Refused as refused:
        report.fault(refused.at, refused.what, refused.allowed, refused.run)
        return None


def _plain(value: Any, path: str, report: Report) -> Data:
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy's booleans and float32 are no Python ones
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, the text alone
    if isinstance(value, numbers.Integral) and int(value).bit_length() <= 1024:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    kind = "number of hundreds of digits" if isinstance(value, numbers.Integral) else type(value).__qualname__
    what = f"a {kind} cannot stand in a {report.kind.noun}"
    report.fault(path, what, "Text, numbers, lists and mappings can")
    return None


def to_data(node: Node) -> Any:
    """The plain Python value of a tree."""
    if isinstance(node.value, dict):
        return {name: to_data(child) for name, child in node.value.items()}
    if isinstance(node.value, tuple):
        return [to_data(child) for child in node.value]
    return node.value
