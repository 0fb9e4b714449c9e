"""What a tensor is, from its name alone: the layer it is in, and the kind of module it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from mixmerge.checkpoint.adapter_names import layer_of

By = Literal["layer", "kind", "tensor"]
BY: tuple[By, ...] = ("layer", "kind", "tensor")

# In this order: a norm inside an attention block is a norm. The patterns are searched in the name's parts
# below the layer, joined by dots and without the last (weight, bias).
_KINDS = (
    ("norm", re.compile(r"norm|(^|\.)ln(_?\d|_\w+)?($|\.)")),
    (
        "head",
        re.compile(r"(^|\.)(lm_head|embed_out|cls|score|classifier|qa_outputs|output_projection)($|\.)"),
    ),
    ("embedding", re.compile(r"embed|(^|\.)(wte|wpe|shared)($|\.)")),
    ("attention", re.compile(r"attn|attention|(^|[._])([qkvo]|qkv|query|key|value)(_proj)?($|\.)|wqkv")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|moe|expert|(gate|up|down)_proj|(^|\.)(fc|w)_?\d($|\.)")),
)
_SHOWN = ("embedding", "attention", "mlp", "norm", "head", "other")
# Where they stand outside of layers; layers are 1, all else is 2.
_OUTSIDE = {"embedding": 0, "head": 3}
# BERT's feed-forward block has no name of its own.
_IN_LAYER = re.compile(r"dense|intermediate|(^|\.)output($|\.)")


def kind_of(name: str) -> str:
    """``attention``, ``mlp``, ``embedding``, ``norm`` or ``head``; ``other`` for what no rule fits."""
    layer = layer_of(name)
    module = name.removeprefix(f"{layer}.").rpartition(".")[0].lower()
    for kind, pattern in _KINDS:
        if pattern.search(module):
            return kind
    return "mlp" if layer and _IN_LAYER.search(module) else "other"


def group_of(name: str, by: By) -> str:
    """The row of a table that a tensor counts in; outside of layers a module is a row."""
    if by == "tensor":
        return name
    if by == "kind":
        return kind_of(name)
    return layer_of(name) or name.rpartition(".")[0] or name


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Layers in every stack, by what stands before the layer's number: an encoder and a decoder are two."""
    found: dict[str, int] = {}
    for name in names:
        stack, _, number = layer_of(name).rpartition(".")
        if stack:
            found[stack] = max(found.get(stack, 0), int(number) + 1)
    return found


def groups(names: Iterable[str], by: By) -> dict[str, list[str]]:
    """Names by row; rows in the order of the model: first what comes before the layers, layers by number.

    Files list ``layers.10`` before ``layers.2``, and the head first.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=_place):
        found.setdefault(group_of(name, by), []).append(name)
    if by == "kind":
        return {kind: found[kind] for kind in _SHOWN if kind in found}
    return found


def _place(name: str) -> tuple[int, str, int, str]:
    stack, _, number = layer_of(name).rpartition(".")
    if stack:
        return 1, stack, int(number), name
    return _OUTSIDE.get(kind_of(name), 2), "", 0, name


def short_names(names: Sequence[str]) -> list[str]:
    """The fewest last parts of every path that tell them apart; of MODEL+ADAPTER those of the adapter."""
    parts = [name.rpartition("+")[2].rstrip("/").split("/") for name in names]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)
