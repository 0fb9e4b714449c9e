"""Where the states of a causal language model of transformers are read and added to, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mixmerge.latent.records import Shape


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The decoder of a model.

    Args:
        trunk: what gives the last states, without the head; called as the model is.
        layers: its layers, in order.
        width: d, of what passes between them.
        final: width of the last state.
    """

    trunk: nn.Module
    layers: nn.ModuleList
    width: int
    final: int

    @classmethod
    def of(cls, model: Any, *, name: str = "") -> Anatomy:
        """By shape: the longest list of layers of the trunk that take hidden states.

        Raises:
            MixmergeError: there is none.
        """
        raise NotImplementedError


def shape_of(model: Any, *, name: str, hash: str) -> Shape:
    """What the glue must know of a model."""
    raise NotImplementedError


@contextmanager
def reading(
    model: Any, depths: Collection[int | Literal["last"]]
) -> Iterator[dict[int | Literal["last"], Tensor]]:
    """Within it, each forward leaves its states at these depths in the dict, ``(B, T, d)``."""
    raise NotImplementedError
    yield {}


@contextmanager
def writing(model: Any, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, the states at these depths are replaced by what the functions make of them."""
    raise NotImplementedError
    yield
