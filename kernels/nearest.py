"""The k largest of many similarities, gathered in several calls, and sums of rows, by their plain definitions.

A similarity is a multiple of 1 / ``NEAREST_ONE`` between -2 and 2. With the place of its row it is one whole number,
its key: the multiple in the upper 32 bits, ``NEAREST_LOW`` less the place in the lower. So the larger key is that of
the larger similarity, and of equal ones that of the lower place: the k largest are the same in whatever order the
rows come.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixmerge.kernels.layout import NEAREST_LOW, NEAREST_ONE

Keys = NDArray[np.int64]
NONE = np.iinfo(np.int64).min  # a key of no row


def keys_of(similar: NDArray[np.float32], rows: Keys) -> Keys:
    """Keys of similarities and the places of their rows, broadcast together."""
    whole = (similar.astype(np.float64) * NEAREST_ONE).astype(np.int64)
    keys: Keys = (whole << 32) | (NEAREST_LOW - rows)
    return keys


def parts_of(keys: Keys) -> tuple[NDArray[np.float32], Keys]:
    """Similarities and places; of no row -2 and -1."""
    there = keys != NONE
    similar = np.where(there, (keys >> 32).astype(np.float64) / NEAREST_ONE, -2.0)
    return similar.astype(np.float32), np.where(there, NEAREST_LOW - (keys & NEAREST_LOW), -1)


def keep_largest_reference(similar: NDArray[np.float32], first: int, keys: Keys, k: int) -> Keys:
    """The k largest keys of each query, largest first: of those it has, and of its similarities to more rows.

    Args:
        similar: ``(Q, m)``.
        first: place of the first of the m rows.
        keys: ``(Q, C)``, ``NONE`` where it has none.
        k: at most C + m.
    """
    new = keys_of(similar, first + np.arange(similar.shape[1]))
    return np.sort(np.concatenate([keys, new], axis=1), axis=1)[:, ::-1][:, :k]


def weighted_sums_reference(
    rows: Keys, weight: NDArray[np.float32], values: NDArray[np.float32]
) -> NDArray[np.float64]:
    """``(Q, E)`` sums of ``weight`` ``(Q, k)`` times the ``rows`` ``(Q, k)`` of ``values`` ``(N, E)``."""
    sums: NDArray[np.float64] = np.einsum("qk,qke->qe", weight.astype(np.float64), values[rows])
    return sums
