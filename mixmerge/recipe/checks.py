"""What must hold between the parts of a recipe: the models and their number, base, required values, sums."""

from __future__ import annotations

import os.path
from dataclasses import dataclass

from mixmerge.document import Node, Report, Scalar
from mixmerge.methods import REQUIRED, Method, Parameter
from mixmerge.methods.records import misplaced
from mixmerge.recipe.references import ModelRef
from mixmerge.recipe.resolving import ZERO_SUM, contradiction, zero_sum
from mixmerge.recipe.schema import Setting
from mixmerge.recipe.settings import constant, is_constant


@dataclass(frozen=True)
class DraftEntry:
    """An entry of ``models`` as read; None stands for what is written but faulty."""

    node: Node
    ref: ModelRef | None
    settings: dict[str, Setting | None]


@dataclass(frozen=True)
class Draft:
    """A recipe as read, before its parts are held against each other. ``nodes`` are its top-level keys."""

    method: Method
    base: ModelRef | None
    entries: tuple[DraftEntry, ...]
    settings: dict[str, Setting | None]
    nodes: dict[str, Node]

    def inputs(self) -> list[DraftEntry]:
        """The readable ones, by the rule of ``schema.inputs``."""
        readable = [entry for entry in self.entries if entry.ref is not None]
        if self.method.base == "required":
            return [entry for entry in readable if entry.ref != self.base]
        if self.base is None or any(entry.ref == self.base for entry in readable):
            return readable
        return [*readable, DraftEntry(self.node("base_model"), self.base, {})]

    def experts(self) -> list[ModelRef] | None:
        """The models of ``inputs``, if every one and the base could be read."""
        unreadable = self.base is None and self.node("base_model").value is not None
        if unreadable or any(entry.ref is None for entry in self.entries):
            return None
        return [entry.ref for entry in self.inputs() if entry.ref is not None]

    def node(self, key: str, inner: str = "") -> Node:
        """Where a top-level key (or a key in it) is, or would be, written."""
        outer = self.nodes.get(key, Node(key, None, None))
        if not inner:
            return outer
        found = outer.value.get(inner) if isinstance(outer.value, dict) else None
        return found or Node(f"{outer.path}.{inner}", outer.line, None)

    def value(self, own: dict[str, Setting | None], parameter: Parameter) -> Scalar | None:
        """The value an input has for every tensor, or None if that is not known or not so simple."""
        for settings in (own, self.settings):
            if parameter.name in settings:
                setting = settings[parameter.name]
                return constant(setting) if setting else None
        return None if parameter.default == REQUIRED else parameter.default


def check(draft: Draft, report: Report) -> None:
    """Report every fault that needs more than one part of the recipe to see."""
    _base(draft, report)
    check_shared(draft, report, count=True)


def check_shared(draft: Draft, report: Report, *, count: bool) -> None:
    """The same of a shared part, whose base is that of the whole.

    Args:
        draft: with the method and the parameters of the shared part.
        report: gets every fault.
        count: look at the number of experts too.
    """
    if count:
        _count(draft, report)
    _required(draft, report)
    _aggregation(draft, report)
    _zero_sum(draft, report)
    _model_scope(draft, report)
    _positions(draft, report)


def check_models(
    entries: tuple[DraftEntry, ...], base: ModelRef | None, base_node: Node, report: Report
) -> None:
    """Report models that are listed twice; warn about one that seems to be, under two spellings."""
    seen: dict[ModelRef, Node] = {}
    for entry in entries:
        if entry.ref is not None and entry.ref in seen:
            what = f"{entry.ref} is listed already, as {seen[entry.ref].path}"
            report.fault(entry.node, what, run="List each model once; to count it twice, add its weights")
        elif entry.ref is not None:
            seen[entry.ref] = entry.node
    spelled: dict[ModelRef, ModelRef] = {}
    for ref in [*seen, *([base] if base and base not in seen else [])]:
        same = spelled.setdefault(_normal(ref), ref)
        if same != ref:
            what = f"{ref} and {same} look like one model spelled in two ways, and count as two"
            report.warn(seen.get(ref, base_node), what, run="Spell them alike if they are the same")


def _normal(ref: ModelRef) -> ModelRef:
    adapter = None if ref.adapter is None else os.path.normpath(ref.adapter)
    return ModelRef(os.path.normpath(ref.path), ref.revision, adapter, ref.adapter_revision)


def _base(draft: Draft, report: Report) -> None:
    node = draft.node("base_model")
    if draft.method.base == "required" and node.value is None:
        report.fault(node, f"{draft.method.name} needs a base_model", run="Add base_model: PATH")


def _count(draft: Draft, report: Report) -> None:
    method, required = draft.method, draft.method.base == "required"
    unknown = not draft.entries or any(entry.ref is None for entry in draft.entries)
    if unknown or (required and draft.base is None):
        return  # how many of the models are experts cannot be said
    found = draft.inputs()
    least, most = method.inputs
    if least <= len(found) <= most:
        return
    limit = least if len(found) < least else most
    amount = "exactly" if least == most else "at least" if len(found) < least else "at most"
    noun = "expert" if limit == 1 else "experts"
    besides = " besides the base_model" if required else ""
    added = ", the base_model among them" if any(entry not in draft.entries for entry in found) else ""
    what = f"{method.name} takes {amount} {limit} {noun}{besides}, and there are {len(found)}{added}"
    report.fault(draft.node("models"), what)


def _required(draft: Draft, report: Report) -> None:
    method = draft.method
    for parameter in method.parameters:
        name = parameter.name
        if parameter.default != REQUIRED or name in draft.settings:
            continue
        if name == "weight" and draft.node("coefficients").value is not None:
            continue
        if parameter.per == "merge":
            what = f"{method.name} needs {name} ({parameter.doc})"
            report.fault(draft.node("parameters", name), what, run=f"Add {name} to the top-level parameters")
            continue
        base_unknown = method.base == "required" and draft.base is None
        for entry in draft.inputs():
            if name in entry.settings or (base_unknown and not entry.settings):
                continue  # a model without parameters may well be the missing base
            if entry not in draft.entries:
                what = f"an unlisted base_model is one more input of {method.name}, and it has no {name}"
                report.fault(entry.node, what, run=f"List it under models with a {name}, or drop base_model")
                continue
            at = Node(f"{entry.node.path}.parameters.{name}", entry.node.line, None)
            what = f"{method.name} needs a {name} for every model"
            report.fault(at, what, run="Add it here or to the top-level parameters")


def _aggregation(draft: Draft, report: Report) -> None:
    agg, normalize = (constant(draft.settings.get(name) or ()) for name in ("agg", "normalize"))
    if agg is not None and normalize is not None and normalize != (agg == "mean"):
        fault = contradiction("", str(agg))
        report.fault(draft.node("parameters", "agg"), fault.what, fault.allowed, fault.run)


def _zero_sum(draft: Draft, report: Report) -> None:
    """Only where the divisor is the plain sum; with a sign election it is the sum of those that agree."""
    method = draft.method
    weight, normalize = method.parameter("weight"), method.parameter("normalize")
    if weight is None or normalize is None or method.parameter("agg") is not None:
        return
    weights = [draft.value(entry.settings, weight) for entry in draft.inputs()]
    if draft.value({}, normalize) is not True or not weights or None in weights:
        return
    if abs(sum(float(value) for value in weights if value is not None)) < ZERO_SUM:
        fault = zero_sum("")
        report.fault(draft.node("models"), fault.what, fault.allowed, fault.run)


def _model_scope(draft: Draft, report: Report) -> None:
    """A threshold over the whole delta needs one density for the whole delta."""
    density, scope = draft.method.parameter("density"), draft.method.parameter("scope")
    if density is None or scope is None or draft.value({}, scope) != "model":
        return
    places = [(draft.node("parameters", "density"), draft.settings.get("density"))]
    for entry in draft.inputs():
        at = Node(f"{entry.node.path}.parameters.density", entry.node.line, None)
        places.append((at, entry.settings.get("density")))
    for node, setting in places:
        if setting and not is_constant(setting):
            report.fault(node, "scope: model needs one density per expert", run="Drop filters and gradient")


def _positions(draft: Draft, report: Report) -> None:
    """A parameter that names an expert by its position names one that is there."""
    known = bool(draft.inputs()) and None not in {entry.ref for entry in draft.entries}
    for parameter in draft.method.parameters:
        value = draft.value({}, parameter) if parameter.position and known else None
        number = None if value is None or isinstance(value, str) else float(value)
        what = "" if number is None else misplaced(number, len(draft.inputs()))
        if what:
            experts = ", ".join(f"{at}: {entry.ref}" for at, entry in enumerate(draft.inputs()))
            report.fault(draft.node("parameters", parameter.name), what, f"Experts by position are {experts}")
