"""Philox4x32-10: random numbers that are a function of a counter, so no result depends on order or threads.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.4; the published
known-answer vectors are in the tests.

A block is made from
    key     = (seed low, seed high)
    counter = (block low 32, expert << 16 | block high 16, name low, name high)
where name is a 64-bit BLAKE2b digest of the tensor's name. Blocks 2 g and 2 g + 1 hold the 32-bit draws of elements
8 g to 8 g + 7, the first their upper halves, the second their lower ones, 16 bits each from the lowest up: whether a
draw is below p * 2**32, which keeps an entry, almost never takes the second.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of one tensor come from.

    Args:
        seed: the recipe's seed, 0 to 2**64 - 1.
        tensor: name of the output tensor.
    """

    seed: int
    tensor: str

    @property
    def key(self) -> tuple[int, int]:
        return self.seed & MASK, (self.seed >> 32) & MASK

    @property
    def name_words(self) -> tuple[int, int]:
        digest = int.from_bytes(hashlib.blake2b(self.tensor.encode(), digest_size=8).digest(), "little")
        return digest & MASK, digest >> 32


def blocks(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Ten rounds over counters ``(4, n)`` held in int64 as unsigned 32-bit words: ``(4, n)``."""
    import torch

    c0, c1, c2, c3 = counter.unbind(0)  # (n,) each
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64; masking after the shift gives the unsigned halves back.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, low0 = (p0 >> 32) & MASK, p0 & MASK
        high1, low1 = (p1 >> 32) & MASK, p1 & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3))


def draws(draw: Draw, *, expert: int, start: int, stop: int) -> torch.Tensor:
    """The draws of elements ``start`` to ``stop``, below 2**32, of one expert: ``(stop - start,)`` int64."""
    import torch

    first, last = start // 8, -(-stop // 8)
    block = torch.arange(2 * first, 2 * last, dtype=torch.int64)  # (2 g,)
    low, high = draw.name_words
    counter = torch.stack(
        (
            block & MASK,
            (block >> 32) | (expert << 16),
            torch.full_like(block, low),
            torch.full_like(block, high),
        )
    )
    words = blocks(counter, draw.key).T  # (2 g, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1, 2, 8)  # (g, 2, 8)
    return ((halves[:, 0] << 16) | halves[:, 1]).reshape(-1)[start - 8 * first : stop - 8 * first]
