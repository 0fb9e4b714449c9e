"""Layers that are computed again on the way back rather than kept, with what the glue does between them outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_SWITCH = "gradient_checkpointing"  # of a layer of transformers
_NO_CACHE = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}


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
            stack.enter_context(_Off(layer))
            stack.callback(layer.register_forward_pre_hook(_without_cache, with_kwargs=True).remove)
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=partial(_around, layer)
            )
            stack.callback(delattr, layer, "forward")
        yield


def _without_cache(
    layer: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: _NO_CACHE.get(name, value) for name, value in given.items()}


def _around(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of computing it, and of computing it again: by then its switch may be on again."""
    return nullcontext(), _Off(layer)


class _Off(AbstractContextManager[None]):
    """Within it a layer does not compute itself again; as often as one likes."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._was = layer, getattr(layer, _SWITCH, None)

    def __enter__(self) -> None:
        self._was = getattr(self._layer, _SWITCH, None)
        if self._was is not None:
            setattr(self._layer, _SWITCH, False)

    def __exit__(self, *_: object) -> None:
        if self._was is not None:
            setattr(self._layer, _SWITCH, self._was)
