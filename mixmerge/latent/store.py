"""Latents on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mixmerge.latent.peers import Peer
from mixmerge.latent.records import Latents, Reading

LIMIT = 16 * 2**30


class Store:
    """A folder of latents, for training again and for jobs that run peers first.

    Args:
        folder: made when something is put there.
        limit: bytes; beyond them what was not used for longest goes.
    """

    def __init__(self, folder: Path, *, limit: int = LIMIT) -> None:
        self.folder, self.limit = Path(folder), limit

    def key(self, expert: str, reading: Reading, depths: Sequence[int | Literal["last"]], dtype: str) -> str:
        """Where a reading's latents are: 64 hex digits. ``expert`` is the expert's hash, ``dtype`` such as ``bfloat16``."""
        raise NotImplementedError

    def get(self, key: str, reading: Reading) -> Latents | None:
        """None if they are not there, or the file is damaged (it is removed then)."""
        raise NotImplementedError

    def put(self, key: str, latents: Latents) -> None:
        """Keep them; whole or not at all.

        Raises:
            OutputError: the disk refuses.
        """
        raise NotImplementedError

    def latents(
        self,
        expert: Peer,
        hash: str,
        readings: Sequence[Reading],
        depths: Sequence[int | Literal["last"]],
        *,
        batch_tokens: int = 8192,
    ) -> list[Latents]:
        """As ``peers.latents``; what is there is read, what is not is made and kept. Tensors are on the CPU."""
        raise NotImplementedError
