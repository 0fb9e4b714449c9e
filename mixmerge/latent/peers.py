"""What peers leave of texts: their states, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from mixmerge.latent.records import Latents, Reading


class Peer(Protocol):
    """A loaded expert, such as ``experts.loading.LoadedExpert`` or ``engines.loading.Loaded``."""

    @property
    def model(self) -> Any: ...


def latents(
    expert: Peer,
    readings: Sequence[Reading],
    depths: Sequence[int | Literal["last"]],
    *,
    batch_tokens: int = 8192,
) -> list[Latents]:
    """Of each reading its states at the depths, on the model's device and in its type; no gradients.

    Texts of like length share a batch, padded on the right; what a row gets does not depend on the others.
    """
    raise NotImplementedError
