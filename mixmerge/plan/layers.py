"""Where in the depth of a model a tensor is, from its name alone: no architecture has to be known."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.*?)(?:^|\.)(\d+)\.(?:.+)")


def layer_of(name: str) -> tuple[str, int] | None:
    """(stack, index) of a tensor's layer: what stands before the first number of its name, and the number."""
    match = _NUMBERED.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def depths(names: Iterable[str]) -> dict[str, int]:
    """Layers in every stack. An encoder and a decoder are two stacks; a lone ``head.0`` is one of one layer."""
    found: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            found[layer[0]] = max(found.get(layer[0], 0), layer[1] + 1)
    return found
