"""Layers that are computed again on the way back rather than kept, with what the glue does between them outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_SWITCH = "gradient_checkpointing"  # of a layer of transformers
_CACHES = ("past_key_values", "past_key_value", "layer_past")


def asked_to(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of the layers that transformers was told to compute again; in training mode alone they are."""
    return [layer for layer in layers if getattr(layer, _SWITCH, False) and layer.training]


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, what these layers compute is not kept for the way back but computed again.

    A layer's hooks stay outside: what the glue does between layers is done once, and kept. In transformers that hangs
    on its version: where hooks are inside, layers are computed again without those that are gone by then, or with
    those of another view. So its own switch is off within. A cache is not handed on: it would be written twice.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_off(layer))
            layer.forward = partial(_again, layer, layer.forward)
            stack.callback(delattr, layer, "forward")
        yield


def _again(layer: nn.Module, forward: Callable[..., Any], *args: Any, **given: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **given)
    without: dict[str, Any] = {name: None for name in _CACHES if given.get(name) is not None}
    if given.get("use_cache"):
        without["use_cache"] = False
    return checkpoint(partial(_plain, layer, forward), *args, use_reentrant=False, **{**given, **without})


def _plain(layer: nn.Module, forward: Callable[..., Any], *args: Any, **given: Any) -> Any:
    with _off(layer):  # on the way back the switch may be on again
        return forward(*args, **given)


@contextmanager
def _off(layer: nn.Module) -> Iterator[None]:
    """A layer that does not compute itself again."""
    was = getattr(layer, _SWITCH, None)
    if was is None:
        yield
        return
    setattr(layer, _SWITCH, False)
    try:
        yield
    finally:
        setattr(layer, _SWITCH, was)
