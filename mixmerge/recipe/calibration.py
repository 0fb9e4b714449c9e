"""The block ``calibration:`` of a recipe: which data a merge may look at, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mixmerge.document import Node, Report, given, read_mapping, read_text, show, unknown_keys
from mixmerge.methods import Method
from mixmerge.recipe.references import ModelRef
from mixmerge.registry import choices

LAYOUTS = ("padded", "packed")
_DATA = "A file of rows, a data set of the hub, or builtin:NAME"
_ADD = "Add calibration: {data: PATH}"
_ADD_EACH = "Add calibration: {per_expert: {EXPERT: PATH}}"
DEFAULT_EXAMPLES = 256
# name -> (default, largest, smallest)
_AMOUNTS = {
    "max_examples": (DEFAULT_EXAMPLES, 10**7, 1),
    "max_tokens": (512, 10**6, 2),
    "batch_size": (8, 10**4, 1),
}


class Calibration(BaseModel):
    """Data for the methods that need some, and its measure.

    Args:
        data: a file, a data set of the hub, or ``builtin:NAME``: the rows of every expert that has none of its own.
        per_expert: by the expert's reference, as ``str(ModelRef)``: its own rows; it wins over ``data``.
        max_examples: rows of each expert, picked by their hash and the recipe's seed.
        max_tokens: of each row; the rest is cut off.
        split: which part of the data; None is ``train`` where there are parts, else all of it.
        layout: ``padded``: a row a line; ``packed``: rows one after the other, for language models.
        batch_size: lines in a batch. Of statistics nothing but the rounding depends on it; of what is learned, which
            rows share a step.
        transductive: the data may be what the result is evaluated on; the model card says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = None
    per_expert: dict[str, str] = Field(default_factory=dict)
    max_examples: int = Field(default=DEFAULT_EXAMPLES, ge=1, le=10**7)
    max_tokens: int = Field(default=512, ge=2, le=10**6)
    split: str | None = None
    layout: Literal["padded", "packed"] = "padded"
    batch_size: int = Field(default=8, ge=1, le=10**4)
    transductive: bool = False

    def source(self, expert: ModelRef) -> str | None:
        """Where the rows of an expert are."""
        return self.per_expert.get(str(expert), self.data)

    def canonical(self) -> dict[str, Any]:
        """Plain data, every value spelled out; what is not set is left out."""
        plain = self.model_dump(exclude_none=True)
        if not self.per_expert:
            del plain["per_expert"]
        else:
            plain["per_expert"] = dict(sorted(self.per_expert.items()))
        return plain


def read_calibration(
    top: dict[str, Node],
    method: Method | None,
    experts: Sequence[ModelRef] | None,
    report: Report,
    *,
    needed: bool | None = None,
) -> Calibration | None:
    """The block of a recipe, held against the method and its experts; None if there is none or it has no effect.

    Args:
        top: the recipe's top-level keys.
        method: its method, if it is known.
        experts: the inputs of the merge, if all could be read.
        report: gets every fault; a block the method does not use is warned about.
        needed: whether there must be data, where not the method alone decides that.
    """
    node = given(top, "calibration")
    needed = method is not None and method.needs_data if needed is None else needed
    if node is None:
        if method is not None and needed:
            what = f"{method.name} learns from data, and the recipe has none"
            report.fault("calibration", what, _DATA, _ADD_EACH if method.bank else _ADD)
        return None
    entries = read_mapping(node, report, "where the data is, and how much of it to use")
    unknown_keys(entries, list(Calibration.model_fields), report)
    block = _block(entries, experts, report)
    if method is not None and not needed:
        report.warn(node, f"has no effect: {method.name} uses no data", run="Remove it")
        return None
    if method is not None and method.learner == "entropy" and block.layout == "packed":
        what = f"has no effect: {method.name} shows a language model each choice in a line of its own"
        report.warn(entries["layout"], what, run="Remove it")
    if isinstance(node.value, dict) and experts is not None and method is not None:
        _complete(node, entries, block, experts, method, report)
    return block


def _block(entries: dict[str, Node], experts: Sequence[ModelRef] | None, report: Report) -> Calibration:
    amounts = {name: _amount(entries, name, report) for name in _AMOUNTS}
    layout: Literal["padded", "packed"] = "padded"
    if chosen := given(entries, "layout"):
        if chosen.value == "packed":
            layout = "packed"
        elif chosen.value != "padded":
            known = choices(str(chosen.value), list(LAYOUTS))
            report.fault(chosen, f"no layout is called {show(chosen.value)}", known)
    transductive = given(entries, "transductive")
    if transductive is not None and not isinstance(transductive.value, bool):
        report.fault(transductive, f"expected true or false, got {show(transductive.value)}")
    return Calibration(
        data=_text(entries, "data", _DATA, report),
        per_expert=_per_expert(entries, experts, report),
        max_examples=amounts["max_examples"],
        max_tokens=amounts["max_tokens"],
        split=_text(entries, "split", "The name of a split, such as train", report),
        layout=layout,
        batch_size=amounts["batch_size"],
        transductive=transductive is not None and transductive.value is True,
    )


def _text(entries: dict[str, Node], key: str, what: str, report: Report) -> str | None:
    node = given(entries, key)
    return _filled(node, what, report) if node else None


def _filled(node: Node, what: str, report: Report) -> str | None:
    value = read_text(node, report, what[0].lower() + what[1:])
    if value is not None and not value.strip():
        report.fault(node, "is empty", what)
        return None
    return value


def _amount(entries: dict[str, Node], name: str, report: Report) -> int:
    default, most, least = _AMOUNTS[name]
    node = given(entries, name)
    if node is None:
        return default
    value = node.value
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    report.fault(node, f"expected a whole number, got {show(value)}", f"From {least} to {most:,}")
    return default


def _per_expert(
    entries: dict[str, Node], experts: Sequence[ModelRef] | None, report: Report
) -> dict[str, str]:
    node = given(entries, "per_expert")
    found: dict[str, str] = {}
    for name, child in (read_mapping(node, report, "an expert and its data") if node else {}).items():
        source = _filled(child, _DATA, report)
        expert = _expert(name, child, experts, report)
        if expert is None or source is None:
            continue
        if expert in found:
            report.fault(child, f"the data of {expert} is given twice", run="Keep one of the two")
        found[expert] = source
    return found


def _expert(name: str, node: Node, experts: Sequence[ModelRef] | None, report: Report) -> str | None:
    """The expert meant by its reference as written, or by the last part of its path."""
    if experts is None:
        return name
    written = [str(expert) for expert in experts]
    if name in written:
        return name
    last = [PurePath(expert.adapter or expert.path).name for expert in experts]
    meant = list(dict.fromkeys(whole for whole, part in zip(written, last, strict=True) if part == name))
    if len(meant) == 1:
        return meant[0]
    if meant:
        what = f"{show(name)} may be {' or '.join(meant)}"
        report.fault(node, what, run="Name the expert as the recipe writes it")
    else:
        report.fault(node, f"no expert is called {show(name)}", choices(name, written))
    return None


def _complete(
    node: Node,
    entries: dict[str, Node],
    block: Calibration,
    experts: Sequence[ModelRef],
    method: Method,
    report: Report,
) -> None:
    """Every expert has data."""
    if given(entries, "data"):
        return
    if not given(entries, "per_expert"):
        report.fault(node, "names no data", _DATA, "Add data: PATH, or per_expert: {EXPERT: PATH}")
        return
    named = given(entries, "per_expert") or node
    lacking = [str(expert) for expert in experts if str(expert) not in block.per_expert]
    for expert in lacking:
        what = f"{expert} has no data, and {method.name} needs some of every expert"
        report.fault(named, what, run="Add it to per_expert, or add data: PATH for the rest")
