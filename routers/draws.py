"""Draws keyed by what is drawn for, never by its place: the order of queries and experts changes nothing.

Q queries, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Keys = NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15


def mix(keys: Keys) -> Keys:
    """Keys scrambled one by one, each to another: the finaliser of SplitMix64.

    Source: Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators; the constants are those of
    Stafford's Mix13.
    """
    mixed = keys + np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def uniform(rows: Keys, columns: Keys, *, seed: int) -> Floats:
    """``(Q, E)`` numbers in [0, 1), each a function of its two keys and the seed.

    Args:
        rows: ``(Q,)`` keys.
        columns: ``(E,)`` keys.
        seed: any integer.
    """
    seeded = mix(rows ^ mix(np.array([seed % 2**64], np.uint64)))
    mixed = mix(seeded[:, None] ^ mix(columns)[None, :])
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def some(keys: Keys, *, at_most: int, seed: int) -> NDArray[np.int64]:
    """Places of ``at_most`` of the keys, ascending: all of them, or those that a draw for each puts first."""
    if len(keys) <= at_most:
        return np.arange(len(keys))
    drawn = uniform(keys, np.zeros(1, np.uint64), seed=seed)[:, 0]
    return np.sort(np.argsort(drawn, kind="stable")[:at_most])
