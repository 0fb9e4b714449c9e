"""A first look at stored rows by few of their dimensions: most are seen to be none of the k nearest.

Q queries, N stored rows, D dimensions, H leading ones.

A row's head is its projection on the H directions in which the stored rows are longest; its tail is the length of
what is left. A cosine is the product of two heads, and what the rests have in common: at most the product of the
tails, and mostly far less. A row is looked at in full only if its head's product and ``slack`` times the tails' reach
the k-th best cosine so far. ``slack`` is such that a share of ``LOST`` of the nearest is missed, as measured on rows
kept out for it.

Source: the idea of passing over a row by a part of its dimensions with a measured margin is that of ADSampling (Gao and
Long, High-Dimensional Approximate Nearest Neighbor Search, SIGMOD 2023). Deviations: principal directions in place of
random ones, one part in place of many, and a margin that is measured in place of a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.routers.grid import on_grid

Embedding = NDArray[np.float32]
LOST = 0.002  # share of the nearest that may be passed over
_PARTS = (16, 8, 4, 2)  # of the dimensions: one in so many is tried
_LOOK = 6  # a look at a row costs as much as so many of its dimensions in a product of matrices
_WORTH = 0.8  # share of the work without, up to which it is worth it
_CLOSE = 0.1  # share of the stored rows that a query is compared with, about
_TRIED = 200  # queries it is chosen on


@dataclass(frozen=True, eq=False)
class Screen:
    """Heads and tails of stored rows. H is 0 where looking at heads first would cost more than it saves.

    Args:
        basis: ``(D, H)``, multiples of the grid's step, as all that is multiplied.
        heads: ``(N, H)``.
        tails: ``(N,)`` 0 or more.
        slack: 0 to 1.
    """

    basis: Embedding
    heads: Embedding
    tails: Embedding
    slack: float

    @classmethod
    def none(cls, stored: Embedding) -> Self:
        empty = np.empty((0, 0), np.float32)
        return cls(
            empty.reshape(stored.shape[1], 0),
            empty.reshape(len(stored), 0),
            np.zeros(len(stored), np.float32),
            1.0,
        )

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """As ``arrays`` gave it."""
        basis, heads, tails = (arrays[name].astype(np.float32) for name in ("basis", "heads", "tails"))
        return cls(basis, np.ascontiguousarray(heads), np.ascontiguousarray(tails), float(arrays["slack"][0]))

    def arrays(self, order: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What to store, with the rows in this order; float16 holds multiples of the step exactly."""
        return {
            "basis": self.basis.astype(np.float16),
            "heads": self.heads[order].astype(np.float16),
            "tails": self.tails[order],
            "slack": np.array([self.slack]),
        }

    def over(self, stored: Embedding) -> Self:
        """The same for other rows."""
        if not self.basis.size:
            return self.none(stored)
        return type(self)(self.basis, *split(stored, self.basis), self.slack)

    def of(self, queries: Embedding) -> tuple[Embedding, Embedding]:
        """Heads ``(Q, H)``, and slack times the tails ``(Q,)``."""
        heads, tails = split(queries, self.basis)
        return heads, np.asarray(self.slack * tails, np.float32)


def split(rows: Embedding, basis: Embedding) -> tuple[Embedding, Embedding]:
    """Heads and tails of rows whose entries are multiples of the step."""
    heads = on_grid(rows @ basis)
    squares = (rows.astype(np.float64) ** 2).sum(axis=1) - (heads.astype(np.float64) ** 2).sum(axis=1)
    return heads, np.asarray(np.sqrt(np.maximum(squares, 0.0)), np.float32)


def choose(stored: Embedding, queries: Embedding, *, k: int) -> Screen:
    """The screen with which least is to be computed, measured on queries that are not stored.

    Args:
        stored: ``(N, D)`` multiples of the step.
        queries: ``(Q, D)``; the first ``_TRIED`` are used.
        k: neighbours that are looked for.
    """
    asked, dimensions = queries[:_TRIED], stored.shape[1]
    similar = asked @ stored.T  # (Q, N)
    near = -np.partition(-similar, [k - 1, int(_CLOSE * len(stored))], axis=1)
    kth, close = near[:, k - 1 : k], near[:, int(_CLOSE * len(stored))][:, None]
    nearest, compared = similar >= kth, similar >= close
    _, directions = np.linalg.eigh(stored.T.astype(np.float64) @ stored)
    best, least = Screen.none(stored), _WORTH * dimensions
    for part in _PARTS:
        count = dimensions // part
        if count < 1:
            continue
        basis = on_grid(directions[:, : -count - 1 : -1])
        (heads, tails), (asked_heads, asked_tails) = split(stored, basis), split(asked, basis)
        rest = np.maximum(asked_tails[:, None] * tails, 1e-9)  # (Q, N)
        needed = (kth - asked_heads @ heads.T) / rest
        slack = float(np.clip(np.quantile(needed[nearest], 1 - LOST), 0, 1))
        work = count + _LOOK * dimensions * float((needed <= slack)[compared].mean())
        if work < least:
            best, least = Screen(basis, heads, tails, slack), work
    return best
