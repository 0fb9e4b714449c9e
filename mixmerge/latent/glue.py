"""All that is trained between the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mixmerge.latent.bridge import Bridge
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.records import Depths, Latents, Memory, Shape


class Glue(nn.Module):
    """The bridges of all experts. ``state_dict`` never has an expert's weights; parameters are float32.

    Args:
        shapes: of the experts, in any order: a bridge is known by its expert's name, and starts the same anywhere.
        depths: as a mixture says them.
        options: of the bridges.
        primary: the only one that reads, so that it has no keys and the others have no queries; None: each may.
        seed: of the initial values.

    Raises:
        MixmergeError: two experts of one name; depths that they do not have.
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

    def bridge(self, expert: str, level: int) -> Bridge:
        raise NotImplementedError

    def primary_depths(self, expert: str) -> tuple[int, ...]:
        """Of each level, where it reads."""
        raise NotImplementedError

    def peer_depths(self, expert: str) -> tuple[int | Literal["last"], ...]:
        """Of each level, where it is read: what ``peers.latents`` takes."""
        raise NotImplementedError

    def blank(self, primary: str, rows: int) -> Memory:
        """A memory with nothing in it but, if there is one, the primary's empty latent."""
        raise NotImplementedError

    def told(self, expert: str, states: Sequence[Tensor], ends: Tensor, *, column: int) -> Memory:
        """A peer's states as a memory to be appended.

        Args:
            states: of each level ``(B, N, d)``.
            ends: ``(B, N)`` int64, ``NEVER`` for padding.
            column: of ``View.gates``.
        """
        raise NotImplementedError

    def memory(self, primary: str, rows: Sequence[Sequence[tuple[str, Latents]]]) -> Memory:
        """Of each row its peers' latents, the first peer's gate in column 1 and so on; rows may differ in peers."""
        raise NotImplementedError
