"""Mixtures whose experts are one network: what their YAML says beside the experts, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mixmerge import registry
from mixmerge.document import Node, Report, given, show
from mixmerge.document.sections import Strict
from mixmerge.errors import MixmergeError
from mixmerge.mixture.schema import ExpertSpec
from mixmerge.mixture.wholes import Asked, check_parts, inner

_ENGINES = ("transformers", "dynamic")
_MADE_ALREADY = ("gate", "data", "split", "samples", "rank", "energy", "budget", "bits", "given", "seed")


_Rank = Annotated[int, Field(ge=1)]
Ranks = Annotated[
    Annotated[_Rank, Tag("rank")] | Annotated[dict[str, _Rank], Tag("ranks")],
    Discriminator(lambda value: "ranks" if isinstance(value, dict) else "rank"),  # for one fault and not two
]


class AdaptersOptions(Strict):
    """What ``compose: {kind: adapters}`` says: either what ``mixmerge fit`` is to make, or the ``folder`` it made.

    Args:
        folder: that ``mixmerge fit`` wrote.
        base: of all experts, a folder or hub id; by default the one that the adapters name.
        gate: its ``kind`` and its options.
        data: rows of text the gate learns from, by expert; or one source for all, where a gate takes that.
        split: which part of the data, where it has parts.
        samples: rows of each source at most; which ones depends on them and the seed.
        rank, energy, budget: how small full experts are made: as ``bank.building.bank_of`` takes them; ``rank`` is one
            for all, or by expert.
        bits: of the factors on disk; by default 16 at matrices where a type of 16 bits holds all experts' factors
            exactly, as it does of adapters stored so, else 32. Scales are stored apart, in float32.
        given: safetensors of a router that was trained elsewhere, for gates that take one.
        encoder: of texts, a folder or hub id, for gates that read them.
        dtype: of the network in memory; ``auto``: as its base is stored.
        seed: of fitting.
    """

    folder: str | None = Field(default=None, min_length=1)
    base: str | None = Field(default=None, min_length=1)
    gate: dict[str, Any] | None = None
    data: str | dict[str, str] | None = None
    split: str | None = Field(default=None, min_length=1)
    samples: int | None = Field(default=None, ge=1)
    rank: Ranks | None = None
    energy: float | None = Field(default=None, gt=0, le=1)
    budget: int | None = Field(default=None, ge=1)
    bits: Literal[8, 16, 32] | None = None
    given: str | None = Field(default=None, min_length=1)
    encoder: str | None = Field(default=None, min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)


def check_gated(asked: Asked, report: Report) -> None:
    """Everything that can be known to be wrong before a file is opened; of a block with faults, what is right of it."""
    check_parts(asked, _ENGINES, report)
    entries, options = asked.entries("compose"), asked.told(AdaptersOptions)
    if options.folder is not None:
        for key in _MADE_ALREADY:
            if given(entries, key) is not None:
                report.fault(
                    entries[key], "has no effect on a fitted network", run="Remove it, or remove folder"
                )
        return
    _check_base(asked.top, asked.experts, options, report)
    _check_sizes(asked.top, asked.experts, options, report)
    _check_gate(asked.top, asked.names, options, report)


def base_of(experts: Mapping[str, ExpertSpec], base: str | None) -> str | None:
    """The base that is said, or the one that adapters name; None if there is none or more than one."""
    named = {str(one.base) for one in experts.values() if one.adapter is not None}
    return base or (named.pop() if len(named) == 1 else None)


def _check_base(
    top: Mapping[str, Node], experts: Mapping[str, ExpertSpec], options: AdaptersOptions, report: Report
) -> None:
    said = given(inner(top["compose"]), "base") is not None
    if said or base_of(experts, options.base) is not None or not experts:
        return
    named = sorted({str(one.base) for one in experts.values() if one.adapter is not None})
    what = (
        f"the adapters are of {len(named)} bases: {', '.join(named)}" if named else "the key base is missing"
    )
    report.fault(top["compose"], what, "base: of all experts, a folder or hub id")


def _check_sizes(
    top: Mapping[str, Node], experts: Mapping[str, ExpertSpec], options: AdaptersOptions, report: Report
) -> None:
    full = [name for name, one in experts.items() if one.adapter is None]
    entries = inner(top["compose"])
    sizes = [key for key in ("rank", "energy", "budget") if given(entries, key) is not None]
    if full and not sizes:
        what = f"{', '.join(full)} {'is a full model' if len(full) == 1 else 'are full models'}, and no size is said"
        report.fault(top["compose"], what, "rank, energy or budget of their factors")
    if isinstance(options.rank, dict) and full:
        _check_ranks(entries["rank"], options.rank, full, sizes == ["rank"], report)
    if sizes and not full and len(experts) == len(inner(top["experts"])):
        report.fault(
            entries[sizes[0]],
            "has no effect on adapters",
            "It is for full models",
            "Remove it",
        )


def _check_ranks(
    node: Node, ranks: Mapping[str, int], full: Sequence[str], alone: bool, report: Report
) -> None:
    """Ranks by expert: of full models, and where nothing else says how small, of each of them."""
    for name in ranks:
        if name not in full:
            what = f"{show(name)} is no expert that is a full model"
            report.fault(inner(node)[name], what, registry.choices(name, list(full)))
    lacking = [name for name in full if name not in ranks]
    if lacking and alone:
        report.fault(node, f"there is no rank of {', '.join(lacking)}", "One for each full model")


def _check_gate(
    top: Mapping[str, Node], names: Sequence[str], options: AdaptersOptions, report: Report
) -> None:
    """Kind and options of the gate, and whether there is what it is fitted from."""
    from mixmerge.bank.fitting import gate_options

    compose = top["compose"]
    entries = inner(compose)
    node = given(entries, "gate")
    if node is None:
        report.fault(compose, "the key gate is missing", "gate: {kind: NAME, ...}")
    _check_names(entries, names, options, report)
    if node is None or options.gate is None:
        return
    kind = options.gate.get("kind")
    if not isinstance(kind, str):
        report.fault(node, "the key kind is missing", registry.choices("", list(registry.table("gate"))))
        return
    if kind == "given":
        others = [name for name in registry.table("gate") if name != kind]
        what = "given has no weights of its own, and queries of a mixture say none: every answer would be the base's"
        report.fault(
            inner(node)["kind"], what, f"Known: {', '.join(others)}", "From Python: DynamicModel, weights="
        )
        return
    said = {key: value for key, value in options.gate.items() if key != "kind"}
    asked, wants = None, None
    try:
        wants = registry.find("gate", kind).wants
        asked = gate_options(kind, said, where="compose.gate")
    except MixmergeError as error:
        for fault in error.faults:
            key = fault.where.removeprefix("compose.gate.").split(".")[0]
            report.fault(inner(node).get(key, node), fault.what, fault.allowed, fault.run)
    if wants is None:
        return
    if getattr(asked, "features", "") == "text":
        wants = (*wants, "encode")
    _check_data(entries, compose, names, options, kind, wants, report)
    _check_unused(entries, kind, wants, report)
    for want, key, what in (
        ("encode", "encoder", "reads texts by an encoder"),
        ("given", "given", "takes a router that was trained elsewhere"),
    ):
        if want in wants and given(entries, key) is None:
            report.fault(compose, f"{kind} {what}, and the key {key} is missing")


def _check_unused(entries: dict[str, Node], kind: str, wants: Sequence[str], report: Report) -> None:
    """Keys that nothing reads."""
    takes = "given" in wants or registry.find("gate", kind).fitter.endswith(":given_ranks")
    unused = {
        "given": "" if takes else f"{kind} takes no router that was trained elsewhere",
        "encoder": "" if "encode" in wants else f"{kind} reads no texts by an encoder",
    }
    if given(entries, "data") is None:
        unused |= dict.fromkeys(("split", "samples"), "has no effect without data")
    for key, what in unused.items():
        if what and given(entries, key) is not None:
            report.fault(entries[key], what, run="Remove it")


def _check_names(
    entries: Mapping[str, Node], names: Sequence[str], options: AdaptersOptions, report: Report
) -> None:
    for name in options.data if isinstance(options.data, dict) else ():
        if name not in names:
            what = f"the mixture has no expert {show(name)}"
            report.fault(inner(entries["data"])[name], what, registry.choices(name, list(names)))


def _check_data(
    entries: dict[str, Node],
    compose: Node,
    names: Sequence[str],
    options: AdaptersOptions,
    kind: str,
    wants: Sequence[str],
    report: Report,
) -> None:
    data = options.data
    each = "rows of each expert" in wants
    if data is None:
        if given(entries, "data") is not None:
            return
        if each or "rows" in wants:
            allowed = "data: {EXPERT: FILE, ...}" if each else "data: FILE, or {EXPERT: FILE, ...}"
            report.fault(compose, f"{kind} learns from rows of text, and the key data is missing", allowed)
        return
    node = entries["data"]
    if not each and "rows" not in wants:
        report.fault(node, f"{kind} learns from no rows", run="Remove it")
    elif isinstance(data, str) and each:
        report.fault(node, f"{kind} learns from rows of each expert by itself", "data: {EXPERT: FILE, ...}")
    if isinstance(data, str):
        return
    lacking = [name for name in names if name not in data]
    if each and lacking:
        report.fault(node, f"there are no rows of {', '.join(lacking)}", f"{kind} learns from rows of each")
