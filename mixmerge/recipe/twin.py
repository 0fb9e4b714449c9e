"""The blocks of a recipe whose method leaves a bank beside the model: ``shared:``, and what its parameters ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.document import Node, Report, given, read_mapping, show, unknown_keys
from mixmerge.methods import METHODS, Method
from mixmerge.methods.rows_dynamic import WIDTHS
from mixmerge.recipe.calibration import Calibration
from mixmerge.recipe.checks import Draft, check_shared
from mixmerge.recipe.choosing import Settings, known_parameters, read_method
from mixmerge.recipe.gate import GateBlock, read_gate
from mixmerge.recipe.references import ModelRef
from mixmerge.recipe.schema import Conditional, ModelEntry, Recipe, Setting, Shared, inputs
from mixmerge.registry import find, table

KEYS = ("shared", "gate")
SHARED, WEIGHT = "task_arithmetic", 0.3
_ONE = ("rank", "energy", "budget")


@dataclass(frozen=True)
class Blocks:
    """What a recipe with a bank says besides: how the shared part is merged, and what weighs the experts.

    Args:
        method: of the shared part; None if it is not known.
        reader: of its parameters.
        settings: its parameters for all experts; None stands for what is written but faulty.
        parameters: where they are, or would be, written.
        gate: None for no gate.
    """

    name: str
    method: Method | None
    reader: Settings
    settings: dict[str, Setting | None]
    parameters: Node
    gate: GateBlock | None

    @property
    def needs_data(self) -> bool:
        return self.gate is not None or (self.method is not None and self.method.needs_data)

    def shared(self) -> Shared:
        """The block; of a recipe without fault."""
        given_ = {name: setting for name, setting in self.settings.items() if setting is not None}
        return Shared(merge_method=self.name, parameters=given_)


def read_blocks(top: dict[str, Node], method: Method | None, report: Report) -> Blocks | None:
    """The blocks of a recipe whose method has a bank; None for any other method."""
    if method is None or not method.bank:
        return None
    node = given(top, "shared")
    entries = read_mapping(node, report, "the shared part: its merge_method and parameters") if node else {}
    unknown_keys(entries, ["merge_method", "parameters"], report)
    named = given(entries, "merge_method")
    asked = named.value if named is not None else SHARED
    rows: Mapping[str, Any] = METHODS if isinstance(asked, str) and asked in METHODS else table("method")
    name, row = (SHARED, METHODS[SHARED]) if named is None else read_method(named, rows, report)
    if row is not None and row.bank and named is not None:
        report.fault(named, f"{name} is not static: it has a shared part itself", "Any other method")
        row = None
    reader = Settings(row, known_parameters(row, rows), rows, report)
    at = Node("shared.parameters", node.line if node else None, None)
    parameters = entries.get("parameters") or at
    settings = reader.read(parameters, "merge")
    if row is not None and row.name == SHARED and "weight" not in settings:
        settings["weight"] = (Conditional(None, (WEIGHT,)),)
    return Blocks(name, row, reader, settings, parameters, read_gate(top.get("gate"), report))


def check_blocks(blocks: Blocks, draft: Draft, report: Report) -> None:
    """Report what must hold between the blocks, the parameters and the models."""
    asked = [name for name in _ONE if name in draft.settings]
    if len(asked) > 1:
        what = f"{' and '.join(asked)} are given, and each says how large the parts are"
        report.fault(draft.node("parameters", asked[1]), what, run="Keep one of them")
    for name in ("energy", "budget"):
        if any(value == 0 for one in draft.settings.get(name) or () for value in one.value):
            report.fault(draft.node("parameters", name), "0 is out of range", f"{name} is above 0")
    wrong = [value for one in draft.settings.get("bits") or () for value in one.value if value not in WIDTHS]
    if wrong:
        known = ", ".join(map(str, WIDTHS))
        report.fault(draft.node("parameters", "bits"), f"is {show(wrong[0])}", known)
    if blocks.method is None:
        return
    required = blocks.method.base == "required"
    entries = tuple(entry for entry in draft.entries if entry.ref is None or entry.ref != draft.base)
    nodes = {**draft.nodes, "parameters": blocks.parameters}
    inner = Draft(blocks.method, draft.base if required else None, entries, blocks.settings, nodes)
    least, _ = draft.method.inputs
    check_shared(inner, report, count=len(draft.inputs()) >= least)
    most = len(draft.inputs())
    if blocks.gate is not None and blocks.gate.top_k is not None and most and blocks.gate.top_k > most:
        report.fault(draft.node("gate", "top_k"), f"is {blocks.gate.top_k}, and there are {most} experts")


def check_rows(calibration: Calibration, experts: Sequence[ModelRef], node: Node, report: Report) -> None:
    """Report experts that share their rows: a gate learns whose rows are whose."""
    owners: dict[str, ModelRef] = {}
    for expert in experts:
        source = calibration.source(expert)
        if source is None:
            continue
        if source in owners:
            what = (
                f"{owners[source]} and {expert} have the same rows, and the gate learns whose rows are whose"
            )
            run = "Give each its own under per_expert, or write gate: none"
            report.fault(node, what, run=run)
            return
        owners[source] = expert


def shared_recipe(recipe: Recipe) -> Recipe:
    """The static recipe of a recipe's shared part; a recipe without bank is one itself.

    A method that counts a base as one more input gets none: the shared part is merged of the experts.
    """
    if recipe.shared is None:
        return recipe
    method: Method = find("method", recipe.shared.merge_method)
    return recipe.model_copy(
        update={
            "merge_method": method.name,
            "models": inputs(recipe),
            "base_model": recipe.base_model if method.base == "required" else None,
            "parameters": recipe.shared.parameters,
            "shared": None,
            "gate": None,
        }
    )


def bank_recipe(recipe: Recipe) -> Recipe:
    """The same recipe without the experts' own parameters, which are those of the shared part."""
    return recipe.model_copy(
        update={"models": tuple(ModelEntry(model=entry.model) for entry in recipe.models)}
    )
