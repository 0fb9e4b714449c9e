"""All that is trained between the experts.

Legend as in ``records``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal
from urllib.parse import quote

import torch
from torch import Tensor, nn

from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.latent.bridge import Bridge
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.records import (
    NEVER,
    NOBODY,
    Depths,
    Latents,
    Memory,
    Shape,
    peer_layers,
    primary_layers,
)


class Glue(nn.Module):
    """The bridges of all experts. ``state_dict`` never has an expert's weights; parameters are float32.

    Args:
        shapes: of the experts, in any order: a bridge is known by its expert's name, and starts the same anywhere.
        depths: as a mixture says them.
        options: of the bridges.
        primary: the only one that reads, so that it has no keys and the others have no queries; None: each may.
        seed: of the initial values.

    Raises:
        MixmergeError: two experts of one name, no such primary, depths that they do not have: all at once.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        depths: Depths,
        options: BridgeOptions,
        *,
        primary: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shapes = {shape.name: shape for shape in shapes}
        self.depths, self.options, self.primary = depths, options, primary
        faults = _faults(shapes, primary)
        self._reads: dict[str, tuple[int, ...]] = {}
        self._told: dict[str, tuple[int | Literal["last"], ...]] = {}
        for name, shape in self.shapes.items():
            if primary in (None, name):
                with collecting(faults):
                    self._reads[name] = primary_layers(depths, shape.layers, name=name)
            if primary != name:
                with collecting(faults):
                    self._told[name] = peer_layers(depths, shape.layers, name=name)
        if faults:
            raise MixmergeError(faults)
        self.levels = len(next(iter((*self._reads.values(), *self._told.values())), ()))
        self.bridges = nn.ModuleList(
            nn.ModuleDict({_key(name): self._made(name, level, seed) for name in sorted(self.shapes)})
            for level in range(self.levels)
        )

    def bridge(self, expert: str, level: int) -> Bridge:
        """Of an expert at a level, from 0."""
        level_bridges = self.bridges[level]
        found = level_bridges[_key(expert)] if isinstance(level_bridges, nn.ModuleDict) else None
        if not isinstance(found, Bridge):
            raise KeyError(expert)
        return found

    def primary_depths(self, expert: str) -> tuple[int, ...]:
        """Of each level, where it reads."""
        return self._reads[expert]

    def peer_depths(self, expert: str) -> tuple[int | Literal["last"], ...]:
        """Of each level, where it is read: what ``peers.latents`` takes."""
        return self._told[expert]

    def blank(self, primary: str, rows: int, *, dtype: torch.dtype | None = None) -> Memory:
        """A memory with nothing in it but, if there is one, the primary's empty latent.

        Args:
            primary: its name.
            rows: B.
            dtype: of the primary's states; None: as the parameters.
        """
        keys = tuple(self.bridge(primary, level).empty(rows) for level in range(self.levels))
        keys = tuple(one if dtype is None else one.to(dtype) for one in keys)
        ends = torch.zeros(rows, keys[0].shape[2], dtype=torch.int64, device=keys[0].device)
        return Memory(keys, tuple(torch.zeros_like(one) for one in keys), ends, ends + NOBODY)

    def told(
        self,
        expert: str,
        states: Sequence[Tensor],
        ends: Tensor,
        *,
        column: int | Tensor,
        dtype: torch.dtype | None = None,
    ) -> Memory:
        """A peer's states as a memory to be appended.

        Args:
            expert: the peer's name.
            states: of each level ``(B, N, d)``.
            ends: ``(B, N)`` int64, ``NEVER`` for padding.
            column: of ``View.gates``; or ``(B,)``, where rows differ.
            dtype: of the primary's states; None: as the peer's.
        """
        pairs = [self.bridge(expert, level).keys(one) for level, one in enumerate(states)]
        kind = states[0].dtype if dtype is None else dtype
        where = torch.as_tensor(column, device=ends.device).reshape(-1, 1)
        return Memory(
            tuple(key.to(kind) for key, _ in pairs),
            tuple(value.to(kind) for _, value in pairs),
            ends,
            where.expand(ends.shape),
        )

    def memory(
        self,
        primary: str,
        rows: Sequence[Sequence[tuple[str, Latents]]],
        *,
        dtype: torch.dtype | None = None,
    ) -> Memory:
        """What the rows of a batch may read, of peers that have read.

        Args:
            primary: its name.
            rows: of each row its peers' latents, the first peer's gate in column 1 and so on; rows may differ in peers.
            dtype: of the primary's states; None: as the peers'.
        """
        if dtype is None:
            found = [part.states[0].dtype for row in rows for _, part in row]
            dtype = found[0] if found else None
        whole = self.blank(primary, len(rows), dtype=dtype)
        for column in range(1, 1 + max(map(len, rows), default=0)):
            having: dict[str, list[int]] = {}
            for at, row in enumerate(rows):
                if len(row) >= column:
                    having.setdefault(row[column - 1][0], []).append(at)
            for expert, places in having.items():
                parts = [rows[at][column - 1][1] for at in places]
                piece = self._piece(expert, parts, column, dtype, whole.ends.device)
                whole = whole.append(piece if len(places) == len(rows) else piece.spread(places, len(rows)))
        return whole

    def _piece(
        self,
        expert: str,
        parts: Sequence[Latents],
        column: int,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> Memory:
        longest = max(len(part.ends) for part in parts)
        ends = torch.full((len(parts), longest), NEVER, dtype=torch.int64, device=device)
        for row, part in enumerate(parts):
            ends[row, : len(part.ends)] = part.ends.to(device)
        padded: dict[int | str, Tensor] = {}
        for level, depth in enumerate(self._told[expert]):
            if depth not in padded:
                states = [part.states[level].to(device) for part in parts]
                padded[depth] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)  # (B, N, d)
        states = [padded[depth] for depth in self._told[expert]]
        return self.told(expert, states, ends, column=column, dtype=dtype)

    def _made(self, name: str, level: int, seed: int) -> Bridge:
        shape = self.shapes[name]
        reads = self._reads[name][level] if name in self._reads else None
        told = self._told[name][level] if name in self._told else None
        key = hashlib.blake2b(f"{seed} {level} {name}".encode(), digest_size=7).digest()
        return Bridge(
            None if reads is None else shape.width_at(reads),
            None if told is None else shape.width_at(told),
            self.options,
            same=reads == told,
            seed=int.from_bytes(key, "little"),
        )


def _key(name: str) -> str:
    """A module may not have a dot in its name, nor the name of a method."""
    return "expert " + quote(name, safe="").replace(".", "%2E")


def _faults(shapes: Sequence[Shape], primary: str | None) -> list[Fault]:
    names = [shape.name for shape in shapes]
    twice = sorted({name for name in names if names.count(name) > 1})
    faults = []
    if twice:
        faults.append(Fault("experts", f"{', '.join(twice)} is there twice", "One name for each"))
    if primary is not None and primary not in names:
        faults.append(Fault("primary", f"no expert is called {primary!r}", ", ".join(names)))
    return faults
