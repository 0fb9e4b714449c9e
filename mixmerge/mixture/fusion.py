"""Mixtures whose experts shift a base's logits: what their YAML says beside the experts, and who has which part."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mixmerge import registry
from mixmerge.document import Report, given, show
from mixmerge.document.sections import Strict
from mixmerge.errors import MixmergeError
from mixmerge.experts import Expert, ExpertSet
from mixmerge.logits.places import Place
from mixmerge.mixture.saving import anchored
from mixmerge.mixture.schema import ExpertSpec, MixtureSpec
from mixmerge.mixture.wholes import NAME, Asked, check_parts

Alpha = Annotated[float, Field(ge=-8, le=8)]
_ENGINES = ("transformers",)
_FITS = ("data", "split", "samples", "alphas", "score", "seed")
_SETTINGS = ("mode", "alpha", "top_p_base", "clip", "damping", "vocabulary", "template", "dtype")


class LogitsOptions(Strict):
    """What ``compose: {kind: logits}`` says.

    Args:
        folder: that ``mixmerge fit`` wrote.
        base: name of the expert whose logits are shifted.
        reference: name of the small one that the experts were tuned from.
        experts: names of those that shift; by default all others.
        mode, alpha, top_p_base, clip, damping: as of ``logits.fusing.Settings``.
        vocabulary, template, dtype: as of ``logits.engine.FusionEngine``.
        data: rows with prompt and answer, of which ``mixmerge fit`` takes the best fixed alpha.
        split: which part of the data, where it has parts.
        samples: rows at most; which ones depends on them and the seed.
        alphas: that are tried, of all experts alike.
        score: of an alpha: ``loss`` of the answers, a language model's; ``exact``: answers that are said as they are.
        seed: of the sample.
    """

    folder: str | None = Field(default=None, min_length=1)
    base: str | None = Field(default=None, min_length=1)
    reference: str | None = Field(default=None, min_length=1)
    experts: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    mode: Literal["static", "one", "joint", "grid"] = "one"
    alpha: Alpha | dict[str, Alpha] = 1.0
    top_p_base: float | None = Field(default=None, gt=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    damping: float = Field(default=1.0, gt=0)
    vocabulary: Literal["same", "intersection"] = "same"
    template: Literal["base", "own"] = "base"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    data: str | None = Field(default=None, min_length=1)
    split: str | None = Field(default=None, min_length=1)
    samples: int | None = Field(default=None, ge=1)
    alphas: tuple[Alpha, ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), strict=False, min_length=1
    )
    score: Literal["loss", "exact"] = "loss"
    seed: int = Field(default=0, ge=0, lt=2**32)


def options_of(spec: MixtureSpec) -> LogitsOptions:
    """What a mixture of this kind says."""
    return LogitsOptions.model_validate(spec.compose.options)


def shifting(told: LogitsOptions, names: tuple[str, ...]) -> tuple[str, ...]:
    """The experts that shift the base, in the order they are said."""
    return told.experts or tuple(one for one in names if one not in (told.base, told.reference))


def engine_options(spec: MixtureSpec) -> dict[str, Any]:
    """What the engine of a fusion is told beside the base's folder, as JSON values; paths hold from any folder."""
    told = options_of(spec)
    base = _place(spec.experts[str(told.base)])
    kept = {key: getattr(told, key) for key in _SETTINGS if key in told.model_fields_set}
    return {
        "reference": _place(spec.experts[str(told.reference)]).as_dict(),
        "experts": {one: _place(spec.experts[one]).as_dict() for one in shifting(told, tuple(spec.experts))},
        "base_name": told.base,
        "reference_name": told.reference,
        **({"base_adapter": base.adapter} if base.adapter else {}),
        **kept,
        **({} if told.folder is None else {"maps": anchored(told.folder)}),
    }


def base_of(spec: MixtureSpec) -> str:
    """Folder or hub id of the base, or of what it is an adapter of."""
    return _place(spec.experts[str(options_of(spec).base)]).model


def experts_of(spec: MixtureSpec) -> ExpertSet:
    """The fusion as an expert, and each of its models alone; all are one unit, which is loaded once."""
    base, options = base_of(spec), engine_options(spec)
    made = [Expert(NAME, base, engine="fusion", options=options)]
    for name, one in spec.experts.items():
        price = None if one.price is None else one.price.of_tokens()
        made.append(Expert(name, base, adapter=name, engine="fusion", options=options, price=price))
    return ExpertSet(tuple(made))


def _place(one: ExpertSpec) -> Place:
    if one.adapter is None:
        return Place(anchored(str(one.model)))
    return Place(anchored(str(one.base)), anchored(one.adapter))


# --- what is wrong


def check_fusion(asked: Asked, report: Report) -> None:
    """Everything that can be known to be wrong before a file is opened; of a block with faults, what is right of it."""
    check_parts(asked, _ENGINES, report)
    told, entries = asked.told(LogitsOptions), asked.entries("compose")
    _check_roles(asked, told, report)
    _check_alpha(asked, told, report)
    _check_fits(asked, told, report)
    damping = given(entries, "damping")
    if damping is not None and told.mode != "joint" and not asked.unread(told, "mode"):
        report.fault(damping, f"has no effect on mode {told.mode}", "mode: joint", "Remove it")


def _check_fits(asked: Asked, told: LogitsOptions, report: Report) -> None:
    """What ``mixmerge fit`` reads, or has read."""
    if asked.unread(told, "folder", "data"):
        return
    entries = asked.entries("compose")
    said = [key for key in _FITS if given(entries, key) is not None]
    if told.folder is not None:
        for key in said:
            report.fault(entries[key], "has no effect on a fitted mixture", run="Remove it, or remove folder")
    elif told.data is None:
        for key in said:
            report.fault(entries[key], "has no effect without data", "data: FILE, for mixmerge fit")
    elif told.mode != "static" and not asked.unread(told, "mode"):
        what = f"data picks a fixed alpha, and mode {told.mode} has none"
        report.fault(entries["data"], what, "mode: static", "Remove data, or say mode: static")
    elif given(entries, "alpha") is not None:
        report.fault(entries["alpha"], "has no effect: data picks it", run="Remove it, or remove data")
    seed = given(entries, "seed")
    if seed is not None and told.data is not None and given(entries, "samples") is None:
        report.fault(seed, "has no effect without samples", run="Remove it, or say samples")


def _check_roles(asked: Asked, told: LogitsOptions, report: Report) -> None:
    """Who is base, reference and expert: each one thing, and all something."""
    names, node = list(asked.names), asked.top["compose"]
    entries = asked.entries("compose")
    for key in ("base", "reference"):
        name = getattr(told, key)
        if name is None and not asked.unread(told, key):
            report.fault(node, f"the key {key} is missing", f"{key}: the name of an expert")
        elif name is not None and name not in names:
            what = f"the mixture has no expert {show(name)}"
            report.fault(entries[key], what, registry.choices(name, names))
    if told.base is not None and told.base == told.reference:
        report.fault(entries["reference"], f"{told.base} is the base", "Another expert, tuned ones' own base")
    for one in told.experts or ():
        if one in (told.base, told.reference):
            role = "base" if one == told.base else "reference"
            report.fault(
                entries["experts"], f"{one} is the {role}, and shifts nothing", "Tuned experts", "Remove it"
            )
    if told.experts is not None and len(set(told.experts)) < len(told.experts):
        report.fault(entries["experts"], "one of them is named twice", "Each once")
    left = shifting(told, tuple(names))
    idle = [one for one in names if one not in (told.base, told.reference, *left)]
    if idle and not asked.unread(told, "base", "reference"):
        what = f"{', '.join(idle)} of the experts {'has' if len(idle) == 1 else 'have'} no part in it"
        report.fault(entries["experts"], what, run="Name them, or remove them from the mixture")
    if not left and told.base in names and told.reference in names:
        report.fault(node, "no expert is left to shift the base", "One or more beside base and reference")


def _check_alpha(asked: Asked, told: LogitsOptions, report: Report) -> None:
    from mixmerge.logits.fusing import Settings

    entries = asked.entries("compose")
    node = given(entries, "alpha")
    if node is None:
        return
    if told.mode != "static" and not asked.unread(told, "mode"):
        report.fault(node, f"has no effect: mode {told.mode} finds it anew for each token", "mode: static")
    if asked.unread(told, "alpha", "base", "reference", "experts"):
        return
    try:
        Settings("static", told.alpha).fixed(shifting(told, tuple(asked.names)))
    except MixmergeError as error:
        report.take(error, node)
