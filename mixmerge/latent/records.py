"""What the parts of an interaction hand each other.

Legend of this package: B rows, T tokens of the primary, N latents that a row may read (all peers side by side), d width
of an expert, s shared width, H heads, M experts, K active ones (the primary is the first of them).

The *message* of a request is what all experts have in common: the text of a plain prompt, or the contents of a chat's
turns one after the other, P bytes of utf-8; then the answer's text. Positions are bytes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from mixmerge.errors import Fault, MixmergeError, collecting

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["prompt", "chunked", "lockstep"]
Depth = int | float | Literal["last"]
Depths = int | tuple[tuple[Depth, Depth], ...]
NEVER = 2**62  # the end of padding: no token may look so far
NOBODY = -1  # whose the empty latent is


@dataclass(frozen=True)
class Reading:
    """One text as one expert reads it.

    Args:
        ids: its tokens.
        ends: of each token as a latent: bytes of the message that its state may contain, an upper bound; never falls.
        seen: of each token as a reader: bytes that who stands there has surely read, a lower bound; never falls, and
            is at most ``ends``. At the end of the prompt it is ``prompt_bytes``.
        answer_from: first token of the answer; the number of tokens where there is none.
        prompt_bytes: P.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    seen: tuple[int, ...]
    answer_from: int
    prompt_bytes: int


def upto_of(reading: Reading, mode: Mode, chunk: int) -> tuple[int, ...]:
    """Up to which byte of the message each token of a primary may look at its peers' latents.

    A prompt's token as far as it has read. Of the answer, in ``prompt`` mode the same; in the others what was handed
    to the peers when the token goes through: ``chunk`` tokens at a time, so that with token g (from 0) in, the first
    ``(g + 1) // chunk * chunk`` of them are.

    Args:
        reading: of the primary; its answer may be cut anywhere.
        mode: how peers follow the answer; ``lockstep`` is ``chunked`` with a chunk of 1.
        chunk: tokens of the primary, 1 or more; of no account in the other modes.
    """
    if mode == "prompt":
        return reading.seen
    step = 1 if mode == "lockstep" else chunk
    start = reading.answer_from
    answer = reading.seen[start:]
    handed = ((at + 1) // step * step for at in range(len(answer)))
    return (*reading.seen[:start], *(answer[n - 1] if n else reading.prompt_bytes for n in handed))


@dataclass(frozen=True)
class Level:
    """Where one bridge stands.

    Args:
        primary: 0: what enters the first layer is added to; n: what leaves layer n. Below the number of layers.
        peer: 0: what enters the first layer is read; n: what leaves layer n; ``last``: what the head reads, after the
            final norm.
    """

    primary: int
    peer: int | Literal["last"]


def levels_of(depths: Depths, layers_primary: int, layers_peer: int) -> tuple[Level, ...]:
    """Depths as said, for a primary and a peer of so many layers.

    Source: Mixture of Thoughts (arXiv 2509.21164): Q equal stacks, an interaction after each but the last.

    Args:
        depths: Q, 2 or more: k/Q of either's layers for k = 1 to Q - 1. Or pairs (primary, peer), each a number of
            layers, a share of them from 0.0 to 1.0 (rounded, halves down), or ``last`` (of a peer).

    Raises:
        MixmergeError: a depth that these experts do not have, or nothing above a primary's; all of them at once.
    """
    faults: list[Fault] = []
    above: tuple[int, ...] = ()
    below: tuple[int | Literal["last"], ...] = ()
    with collecting(faults):
        above = primary_layers(depths, layers_primary)
    with collecting(faults):
        below = peer_layers(depths, layers_peer)
    if faults:
        raise MixmergeError(faults)
    return tuple(Level(one, other) for one, other in zip(above, below, strict=True))


def primary_layers(depths: Depths, layers: int, *, name: str = "a primary") -> tuple[int, ...]:
    """Of each level, where a primary of so many layers reads. As ``levels_of``."""
    found = [(pair[0], _layer(pair[0], layers)) for pair in _pairs(depths)]
    allowed = (
        f"0 to {layers - 1}, or a share of the layers that leaves one: something must follow what is read"
    )
    wrong = [
        Fault(f"depths[{at}][0]", f"is {said}, and {name} has {layers} layers", allowed)
        for at, (said, layer) in enumerate(found)
        if layer is None or layer >= layers
    ]
    if wrong:
        raise MixmergeError(wrong)
    return tuple(layer for _, layer in found if layer is not None)


def peer_layers(depths: Depths, layers: int, *, name: str = "a peer") -> tuple[int | Literal["last"], ...]:
    """Of each level, where a peer of so many layers is read. As ``levels_of``."""
    found = [(pair[1], "last" if pair[1] == "last" else _layer(pair[1], layers)) for pair in _pairs(depths)]
    allowed = f"0 to {layers}, a share from 0.0 to 1.0, or last"
    wrong = [
        Fault(f"depths[{at}][1]", f"is {said}, and {name} has {layers} layers", allowed)
        for at, (said, layer) in enumerate(found)
        if layer is None
    ]
    if wrong:
        raise MixmergeError(wrong)
    return tuple(layer if isinstance(layer, int) else "last" for _, layer in found)


def _pairs(depths: Depths) -> tuple[tuple[Depth, Depth], ...]:
    if not isinstance(depths, int):
        if not depths:
            raise MixmergeError(Fault("depths", "has no pair", "One or more"))
        return depths
    if depths < 2:
        raise MixmergeError(Fault("depths", f"is {depths}", "2 or more, or a list of pairs"))
    return tuple((k / depths, k / depths) for k in range(1, depths))


def _layer(depth: Depth, layers: int) -> int | None:
    """The layer of a depth; None where there is none."""
    if isinstance(depth, str | bool):
        return None
    if isinstance(depth, float):
        return math.ceil(depth * layers - 0.5) if 0 <= depth <= 1 else None
    return depth if 0 <= depth <= layers else None


@dataclass(frozen=True)
class Shape:
    """What the glue must know of an expert.

    Args:
        name: unique among the experts.
        width: of the states between its layers.
        layers: their number.
        hash: of the expert, 64 hex digits.
        vocabulary: rows of its embedding.
        final: width of the state that its head reads; 0: ``width``.
    """

    name: str
    width: int
    layers: int
    hash: str
    vocabulary: int
    final: int = 0

    def width_at(self, depth: int | str) -> int:
        """Of the states at a depth."""
        return self.final or self.width if depth == "last" else self.width


@dataclass(frozen=True, eq=False)
class Latents:
    """What a peer leaves of one text: of each level its states ``(N, d)`` in the model's type, and ``ends`` (N,)."""

    states: tuple[Tensor, ...]
    ends: Tensor

    @property
    def nbytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in {id(one): one for one in self.states}.values())


@dataclass(frozen=True, eq=False)
class Memory:
    """What the rows of a batch may read, projected once.

    Args:
        keys, values: of each level ``(B, H, N, s/H)``.
        ends: ``(B, N)`` int64: as ``Reading.ends``; ``NEVER`` for padding, which may stand anywhere.
        peer: ``(B, N)`` int64: which of the active experts it is of, a column of ``View.gates`` from 1 on; ``NOBODY``:
            the empty latent, which every token sees.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    ends: Tensor
    peer: Tensor

    @cached_property
    def counts(self) -> Tensor:
        """``(B, N)`` float32: 1 for a latent, 0 for padding and the empty one, which are at no distance."""
        return ((self.ends < NEVER) & (self.peer != NOBODY)).float()

    def append(self, other: Memory) -> Memory:
        """With more latents of the same rows behind."""
        import torch

        return Memory(
            tuple(torch.cat(pair, dim=2) for pair in zip(self.keys, other.keys, strict=True)),
            tuple(torch.cat(pair, dim=2) for pair in zip(self.values, other.values, strict=True)),
            torch.cat([self.ends, other.ends], dim=1),
            torch.cat([self.peer, other.peer], dim=1),
        )

    def keep(self, rows: Sequence[int]) -> Memory:
        """Of these rows alone, in this order."""
        import torch

        kept = torch.tensor(rows, device=self.ends.device)
        return Memory(
            tuple(one[kept] for one in self.keys),
            tuple(one[kept] for one in self.values),
            self.ends[kept],
            self.peer[kept],
        )

    def spread(self, places: Sequence[int], rows: int) -> Memory:
        """Of some rows, as a memory of so many; the others get padding.

        Args:
            places: of these rows among all.
            rows: of all.
        """
        import torch

        at = torch.tensor(places, device=self.ends.device)

        def wide(part: Tensor, fill: int) -> Tensor:
            return part.new_full((rows, *part.shape[1:]), fill).index_copy(0, at, part)

        return Memory(
            tuple(wide(one, 0) for one in self.keys),
            tuple(wide(one, 0) for one in self.values),
            wide(self.ends, NEVER),
            wide(self.peer, 0),
        )


@dataclass(eq=False)
class View:
    """What the tokens that go through the primary now may read.

    Args:
        memory: of the rows.
        gates: ``(B, K)`` probabilities of the active experts, the primary's in column 0, its peers' from 1 on, 0 in
            columns that a row does not use; with gradient in training. None: all the same, which is 1/K each.
        seen, upto: ``(B, T)`` int64, of each token: ``Reading.seen`` and ``upto_of``; 0 for padding, -1 for ``seen`` of
            padding that ``watch`` shall take no note of.
        watch: ``(B, K)`` float32, to which is added how much attention went to the empty latent (column 0) and to
            each peer, one in all for each token and level; slower. None: nobody asks.
    """

    memory: Memory
    gates: Tensor | None
    seen: Tensor
    upto: Tensor
    watch: Tensor | None = None
