"""What a model is made of, as far as headers and config say, and what running it takes in memory.

The formulas count the tensors that are there at one time, of the common shapes of a transformer, in float32 unless a
width is given; each that belongs to one stage of the work stands beside that stage. They lean to the high side: some
terms that are not there at the same time are added, and ``_AT_ONCE``, ``_KEPT`` and ``Anatomy.loading`` were set by
measurements on small models of Llama's kind. A model that is built otherwise may take more.

Shapes: B lines of a batch, L tokens in the longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Vectors of a place that a layer has at once while it runs without gradients: its input, what is added to it, the
# inputs and outputs of the widest maps, and what is made of them.
_AT_ONCE = 6
# Vectors of the hidden width that a layer keeps of a place beside what its maps read and write: norms, rotations, sums.
_KEPT = 10


@dataclass(frozen=True)
class Shown:
    """The largest batch a model is shown.

    Args:
        lines: B.
        length: L.
        tokens: real ones, at least 1; None: no padding.
        scored: places whose logits are looked at; None: all.
    """

    lines: int
    length: int
    tokens: int | None = None
    scored: int | None = None

    @property
    def places(self) -> int:
        """Tokens, padding included."""
        return self.lines * self.length


@dataclass(frozen=True)
class Anatomy:
    """A model in numbers.

    Args:
        shapes: of its tensors, by name; those an adapter is merged into are there once.
        maps: (inputs, outputs) of the matrix of every linear map, by name; no tables.
        layers, hidden, heads: their number, the width of what passes between them, the parts of attention.
        vocabulary: logits of a place; 0 where they are those of a few classes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    maps: Mapping[str, tuple[int, int]]
    layers: int
    hidden: int
    heads: int = 1
    vocabulary: int = 0

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def loading(self) -> int:
        """Bytes of a model in float32, and as much again for what has been freed and the allocator keeps.

        Loading makes no second copy: weights of 16 bits are converted one by one, those in float32 stay mapped. But
        blocks of up to 32 MB that were freed, such as the sums of the expert before, mostly do not go back to the
        system. That this comes to no more than one model was seen with glibc on small models; it is no bound.
        """
        return 2 * 4 * self.elements

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(math.prod, self.shapes.values()), default=0)

    def forward(self, shown: Shown, *, width: int = 4) -> int:
        """Bytes of one batch on its way through the model without gradients, its logits at the end included."""
        widest = max((max(pair) for pair in self.maps.values()), default=self.hidden)
        running = shown.places * _AT_ONCE * max(widest, self.hidden)
        scores = 2 * shown.lines * self.heads * shown.length**2
        logits = shown.places * self.vocabulary
        return width * max(running + scores, logits + shown.places * self.hidden)

    def backward(self, shown: Shown, *, width: int = 4) -> int:
        """Bytes that layers keep of a batch for the way back: inputs and outputs of every map, and the attention."""
        kept = shown.places * (sum(map(sum, self.maps.values())) + _KEPT * self.layers * self.hidden)
        scores = 2 * shown.lines * self.heads * shown.length**2
        return width * (kept + scores)


@dataclass(frozen=True)
class Need:
    """What a stage takes.

    Args:
        memory: bytes that are there at one time, by what they are.
        disk: bytes kept on disk meanwhile.
    """

    memory: Mapping[str, int] = field(default_factory=dict)
    disk: int = 0

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())
