"""Which rows a step takes: every epoch has an order of its own, drawn from the seed and the epoch's number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def taken(rows: Sequence[int], *, size: int, step: int, seed: int, what: str = "order") -> list[int]:
    """The rows of one step.

    Args:
        rows: all there are; of none, none are taken.
        size: of a step.
        step: from 0.
        seed: any whole number.
        what: tells orders of one seed apart.
    """
    if not rows:
        return []
    found, orders = [], dict[int, list[int]]()
    for at in range(step * size, (step + 1) * size):
        epoch, place = divmod(at, len(rows))
        if epoch not in orders:
            draw = torch.Generator().manual_seed(number(seed, what, epoch))
            orders[epoch] = torch.randperm(len(rows), generator=draw).tolist()
        found.append(rows[orders[epoch][place]])
    return found


def number(seed: int, what: str, at: int) -> int:
    """A seed for one thing that is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}:{at}".encode()).digest()[:7], "big")
