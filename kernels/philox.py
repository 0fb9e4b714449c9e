"""Philox4x32-10: random numbers that are a function of a counter, so no result depends on order or threads.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.4; the published
known-answer vectors are in the tests.

The 32-bit draw of one element is lane ``element % 4`` of the block with
    key     = (seed low, seed high)
    counter = (block low 32, expert << 16 | block high 16, name low, name high),  block = element // 4
where name is a 64-bit BLAKE2b digest of the tensor's name. An entry is kept when draw < p * 2**32.
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

    first, last = start // 4, -(-stop // 4)
    block = torch.arange(first, last, dtype=torch.int64)  # (b,)
    low, high = draw.name_words
    counter = torch.stack(
        (
            block & MASK,
            (block >> 32) | (expert << 16),
            torch.full_like(block, low),
            torch.full_like(block, high),
        )
    )
    words = blocks(counter, draw.key)  # (4, b)
    return words.T.reshape(-1)[start - 4 * first : stop - 4 * first]
