"""A bridge: how one expert is read at one level, and how it reads others there."""

from __future__ import annotations

from torch import Tensor, nn

from mixmerge.latent.options import BridgeOptions


class Bridge(nn.Module):
    """Of one expert at one level.

    Args:
        reads: width of the expert's states at its depth as a primary; None: it is never one.
        told: width of its states at its depth as a peer; None: it is never one.
        options: of the glue.
        same: both are the same depth, and share norm and projection.
        seed: of the initial values.
    """

    def __init__(
        self, reads: int | None, told: int | None, options: BridgeOptions, *, same: bool, seed: int
    ) -> None:
        super().__init__()

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, N, s/H)`` of states ``(B, N, d)``."""
        raise NotImplementedError
