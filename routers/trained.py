"""What a router remembers of the outcomes it was fitted on. Q queries, T different texts, E experts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.outcomes.table import OutcomeTable, column_means

Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256; texts that differ in white space and case only have the same."""
    plain = " ".join(text.split()).casefold().encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(plain).digest()[:8], "big")


def text_hashes(texts: Iterable[str]) -> Hashes:
    """``(Q,)``, in the order of the texts."""
    return np.array([text_hash(text) for text in texts], np.uint64)


@dataclass(frozen=True, eq=False)
class TrainedOn:
    """Which queries were fitted on, and how good every expert was there. No text of them is kept.

    Args:
        hashes: ``(T,)`` sorted hashes of the texts; eight bytes each.
        mean: ``(E,)`` mean known score of every expert.
        cost: ``(E,)`` mean known dollars of every expert, NaN where nothing is known.
    """

    hashes: Hashes
    mean: Floats
    cost: Floats

    @classmethod
    def of(cls, table: OutcomeTable) -> Self:
        costs = table.costs()
        unknown = np.full(len(table.experts), np.nan)
        return cls(
            np.unique(text_hashes(table.queries)),
            column_means(table.score),
            unknown if costs is None else column_means(costs),
        )

    def saw(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """``(Q,)``: which of these texts it was fitted on."""
        return np.isin(text_hashes(texts), self.hashes)

    def extended(self, more: TrainedOn) -> Self:
        """With the experts of ``more`` behind, and its queries too."""
        return type(self)(
            np.union1d(self.hashes, more.hashes),
            np.append(self.mean, more.mean),
            np.append(self.cost, more.cost),
        )

    def without(self, at: int) -> Self:
        """Without the expert at that place; its queries stay, for the others were fitted on them."""
        return type(self)(self.hashes, np.delete(self.mean, at), np.delete(self.cost, at))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"hashes": self.hashes, "mean": self.mean, "cost": self.cost}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        return cls(arrays["hashes"], arrays["mean"], arrays["cost"])
