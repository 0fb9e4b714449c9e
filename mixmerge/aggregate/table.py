"""Compositions by name, and how one is made of its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mixmerge import registry
from mixmerge.aggregate.cascade import ConfidenceCascade, Escalation
from mixmerge.aggregate.options import CascadeOptions, read_options
from mixmerge.aggregate.records import Composition
from mixmerge.errors import Fault, MixmergeError


@dataclass(frozen=True)
class CompositionRow:
    """One composition.

    Args:
        target: ``module:Class`` of a ``Composition`` that is made of its options.
        options: ``module:Class`` of those: a frozen pydantic model, all of whose fields have defaults.
        summary: what it does, in a line.
        paper: where it is from; "" for textbook methods.
    """

    target: str
    options: str
    summary: str
    paper: str = ""


def _row(module: str, made: str, options: str, summary: str, paper: str = "") -> CompositionRow:
    return CompositionRow(
        f"mixmerge.aggregate.{module}:{made}", f"mixmerge.aggregate.options:{options}", summary, paper
    )


COMPOSITIONS: dict[str, CompositionRow] = {
    "answer": _row(
        "answer", "PrimaryAnswer", "AnswerOptions", "the primary's answer, or that of the next pick"
    ),
    "vote": _row("vote", "Vote", "VoteOptions", "what most picks say, by their weights"),
    "best": _row("best", "BestOf", "BestOptions", "the answer that its own expert found likeliest"),
    "self_consistency": _row(
        "self_consistency",
        "SelfConsistency",
        "SelfConsistencyOptions",
        "what most samples of the primary say",
        "arXiv 2505.19797",
    ),
    "aggregate": _row(
        "synthesis",
        "Aggregate",
        "AggregateOptions",
        "one answer that an aggregator makes of the picks'",
        "arXiv 2503.05641",
    ),
    "moa": _row(
        "moa", "Moa", "MoaOptions", "layers that see the answers of the layer before, then an aggregator"
    ),
    "self_moa": _row(
        "moa", "SelfMoa", "SelfMoaOptions", "one answer made of samples of the primary", "arXiv 2502.00674"
    ),
    "self_moa_seq": _row(
        "sequential",
        "SelfMoaSeq",
        "SelfMoaSeqOptions",
        "the same, a window of samples at a time",
        "arXiv 2502.00674",
    ),
    "cascade": _row(
        "cascade",
        "ConfidenceCascade",
        "CascadeOptions",
        "one expert after the other, until an answer is sure enough",
    ),
}


def options_of(kind: str) -> type[BaseModel]:
    """The model of a composition's options.

    Raises:
        MixmergeError: no such composition.
    """
    model: type[BaseModel] = registry.load(registry.find("composition", kind).options)
    return model


def composition(
    kind: str,
    options: Mapping[str, Any] | BaseModel | None = None,
    *,
    escalation: Escalation | None = None,
    where: str = "compose",
) -> Composition:
    """A composition of a name.

    Args:
        kind: one of ``COMPOSITIONS``, or of a plug-in (entry-point group ``mixmerge.composition``).
        options: a mapping, or the model itself.
        escalation: a fitted cascade; for ``cascade`` only.
        where: the options are, for faults.

    Raises:
        MixmergeError: no such name; options that do not exist or are out of range, all at once; an escalation for
            another composition.
    """
    row = registry.find("composition", kind)
    made = registry.load(row.target)
    if isinstance(options, BaseModel):
        chosen: BaseModel = options
    else:
        chosen = read_options(options_of(kind), options or {}, where=where)
    if isinstance(chosen, CascadeOptions):
        return ConfidenceCascade(chosen, escalation)
    if escalation is not None:
        raise MixmergeError(Fault(where, f"{kind} takes no escalation", "Only cascade does"))
    found: Composition = made(chosen)
    return found


def markdown() -> str:
    """A Markdown table of the compositions that come with mixmerge, with their options; no final line break."""
    rows = [("kind", "the answer", "options = default", "source"), ("---",) * 4]
    for name, row in COMPOSITIONS.items():
        options = ", ".join(
            f"`{key}`" if one.default is None else f"`{key}` = {_shown(one.default)}"
            for key, one in options_of(name).model_fields.items()
        )
        rows.append((f"`{name}`", row.summary, options, row.paper))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
