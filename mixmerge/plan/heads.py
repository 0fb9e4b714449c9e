"""Experts with heads of their own, such as classifiers of other classes: the trunk is merged, every head is kept.

A merge that makes one expert's model gives it that expert's head besides.

A head is what a ``*ForSequenceClassification``, ``*ForTokenClassification``, ``*ForQuestionAnswering`` or
``*ForMultipleChoice`` model stores outside its trunk. Its trunk is what stands under the first part of the names of
its layers: ``bert.`` of ``bert.encoder.layer.0``. A model without a head stores the same tensors with or without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from mixmerge.checkpoint.header import TensorHeader
from mixmerge.plan.layers import layer_of
from mixmerge.plan.model import Dropped, Head, Model, Source

_HEADED = re.compile(r"(.+)For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)")
# Facts of a config that belong to a head; the trunk's config has none of them.
_FACTS = (
    *("id2label", "label2id", "problem_type", "num_labels", "_num_labels", "finetuning_task"),
    "classifier_dropout",
)
_POOLER = "pooler."


@dataclass(frozen=True)
class Trunks:
    """What is merged of each model, and what is not.

    Args:
        models: as in the plan, with the trunk's tensors under names without prefix and the trunk's config; unchanged
            if all heads are alike, which are then merged like everything else.
        heads: of each model that has a head, its tensors by their stored names.
        outside: of each model, what is not merged, by stored names.
        prefix: what stands before the trunk's names where a model has a head.
    """

    models: tuple[Model, ...]
    heads: dict[int, dict[str, TensorHeader]]
    outside: dict[int, dict[str, TensorHeader]]
    prefix: str = ""

    @property
    def merged_whole(self) -> bool:
        """The heads are alike, and merged too."""
        return not any(self.outside.values())

    @property
    def own(self) -> frozenset[str]:
        """Names of the tensors of all heads."""
        return frozenset(name for tensors in self.heads.values() for name in tensors)


def trunks(models: Sequence[Model]) -> Trunks:
    """Tell the trunks of the inputs from their heads; without any head, the inputs as they are."""
    plain = Trunks(tuple(models), {}, {})
    prefixes = {number: _prefix(model) for number, model in enumerate(models) if _kind(model)}
    prefix = next((found for found in prefixes.values() if found), None)
    if prefix is None:
        return plain
    heads = {number: _outside(models[number], prefix) for number in prefixes}
    if len(heads) == len(models) and _alike(models, heads):
        return Trunks(tuple(models), heads, {})
    outside = {number: _outside(model, prefix) for number, model in enumerate(models)}
    pooled = [any(name.startswith(_POOLER) for name in _inside(model, prefix)) for model in models]
    if not all(pooled):
        for number, model in enumerate(models):
            own = {
                name: header
                for name, header in model.tensors.items()
                if _short(name, prefix).startswith(_POOLER)
            }
            outside[number].update(own)
    heads = {number: outside[number] for number in prefixes}
    name = _trunk_class(models)
    views = tuple(_view(model, prefix, outside[number].keys(), name) for number, model in enumerate(models))
    return Trunks(views, heads, outside, prefix)


def _architecture(model: Model) -> str:
    named = model.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _kind(model: Model) -> re.Match[str] | None:
    return _HEADED.fullmatch(_architecture(model))


def _prefix(model: Model) -> str | None:
    """The first part of most names that hold the number of a layer."""
    parts = Counter(name.split(".", 1)[0] for name in model.tensors if layer_of(name))
    return parts.most_common(1)[0][0] + "." if parts else None


def _has_prefix(model: Model, prefix: str) -> bool:
    return any(name.startswith(prefix) and layer_of(name) for name in model.tensors)


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _inside(model: Model, prefix: str) -> dict[str, TensorHeader]:
    """The trunk's tensors, by their names without prefix."""
    marked = _has_prefix(model, prefix)
    return {
        _short(name, prefix): header
        for name, header in model.tensors.items()
        if not marked or name.startswith(prefix)
    }


def _outside(model: Model, prefix: str) -> dict[str, TensorHeader]:
    if not _has_prefix(model, prefix):
        return {}
    return {name: header for name, header in model.tensors.items() if not name.startswith(prefix)}


def _alike(models: Sequence[Model], heads: dict[int, dict[str, TensorHeader]]) -> bool:
    """One architecture, one shape of head, and the same names of the same classes."""
    seen = {
        repr(
            [
                _architecture(models[number]),
                sorted((name, header.shape) for name, header in head.items()),
                sorted((models[number].config.get("id2label") or {}).items()),
                models[number].config.get("problem_type"),
            ]
        )
        for number, head in heads.items()
    }
    return len(seen) == 1


def _trunk_class(models: Sequence[Model]) -> str:
    """The class without a head: an input's, or the one of its name: ``BertModel``."""
    for model in models:
        if _architecture(model).endswith("Model") and "LMHead" not in _architecture(model):
            return _architecture(model)
    found = next(kind for model in models if (kind := _kind(model)))
    return f"{found[1]}Model"


def _view(model: Model, prefix: str, outside: Any, trunk: str) -> Model:
    config = {key: value for key, value in model.config.items() if key not in _FACTS}
    config["architectures"] = [trunk]
    tensors = {name: header for name, header in _inside(model, prefix).items() if header.name not in outside}
    deltas = {_short(name, prefix): delta for name, delta in model.deltas.items() if name not in outside}
    return replace(model, tensors=tensors, deltas=deltas, config=config)


def kept_heads(found: Trunks, models: Sequence[Model], entries: Sequence[int]) -> tuple[Head, ...]:
    """The heads of the experts, each under a name of its own: the last part of the expert's path.

    Args:
        found: as ``trunks`` gives it.
        models: the plan's inputs.
        entries: which of them are experts.
    """
    experts = [number for number in entries if found.heads.get(number)]
    heads = []
    for number, unique in zip(experts, names_of(models, experts), strict=True):
        model = models[number]
        sources = tuple(
            Source(number, header, model.deltas.get(stored)) for stored, header in found.heads[number].items()
        )
        heads.append(Head(unique, number, sources, model.config))
    return tuple(heads)


@dataclass(frozen=True)
class Owner:
    """The expert whose model is made, where experts have heads of their own: the model has this one's.

    Args:
        model: index into the plan's models.
        prefix: before the names of the trunk's tensors, as the expert stores them.
        head: by the names of its tensors, which are in the model as they are.
        config: the expert's ``config.json``.
    """

    model: int
    prefix: str
    head: dict[str, Source]
    config: dict[str, Any]


def owner_of(found: Trunks, models: Sequence[Model], number: int | None) -> Owner | None:
    """The owner of what is merged; None if it is nobody's, or its head is merged with the rest or is not there.

    Args:
        found: as ``trunks`` gives it.
        models: the plan's inputs.
        number: which of them the merge makes the model of.
    """
    if number is None or found.merged_whole or not found.heads.get(number):
        return None
    model = models[number]
    head = {
        name: Source(number, header, model.deltas.get(name)) for name, header in found.heads[number].items()
    }
    return Owner(number, found.prefix, head, model.config)


def names_of(models: Sequence[Model], experts: Sequence[int]) -> tuple[str, ...]:
    """A name for each expert: the last part of its path, with its place where two are called alike."""
    names = [
        PurePath(models[number].ref.adapter or models[number].ref.path).name or "head" for number in experts
    ]
    return tuple(name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names))


def outside_of(found: Trunks, heads: Sequence[Head], owner: Owner | None) -> tuple[Dropped, ...]:
    """What of each input is not in the output's model, and where it is instead."""
    kept = {head.model: head.expert for head in heads}
    return tuple(
        Dropped(
            number,
            name,
            f"its head, kept in heads/{kept[number]}" if number in kept else "not of the trunk",
            header.nbytes,
        )
        for number, tensors in found.outside.items()
        if owner is None or number != owner.model
        for name, header in tensors.items()
    )


def head_notes(found: Trunks) -> list[str]:
    """What a person should know of heads that are merged like the rest."""
    if not found.heads or not found.merged_whole:
        return []
    return ["all heads are alike, so they are merged too; each expert's own is kept in heads/"]
