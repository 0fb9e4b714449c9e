"""What compiled loops and their callers agree on: dtype codes, block sizes, sizes of scratch."""

from __future__ import annotations

CODES = {"BF16": 0, "F16": 1, "F32": 2}
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}

# Elements per block: what a block of a few inputs needs fits the second-level cache.
BLOCK = 4096
# The same where experts are compared in pairs: the deltas of a few and their marks fit the first-level cache. A
# byte of a word counts to 255 at most, and a block has fewer words than that.
COMPARE_BLOCK = 2016
# Partial sums are kept in this many lanes, so that they vectorise and still add in one fixed order.
LANES = 64

# How a delta is sparsified: not at all, by a ``Cut``, by a mask of bits.
KEEP_ALL, KEEP_CUT, KEEP_BITS = 0, 1, 2

# A magnitude's 31 bits are counted in two steps: the high 16, then the low 15 under one high value.
HIGH_BINS, LOW_BINS, LOW_SHIFT = 1 << 16, 1 << 15, 15

# Philox blocks of four words that the scratch of the draws holds.
DRAW_BLOCKS = 2048

# Digits of the sort that ranks a row.
RADIX = 1 << 11

# The low-rank product takes the rank this many at a time.
RANK_STEP = 4
# Columns it does at once: four rows of its inputs and of the output then stay in a 48 KiB first-level cache.
TILE = 1024

# Similarities are multiples of 1 / NEAREST_ONE; beside one, NEAREST_LOW less the place of its row has 32 bits.
NEAREST_ONE, NEAREST_LOW = 1 << 22, (1 << 32) - 1


def rank_words(row: int) -> int:
    """uint32 words of scratch that a row of that many entries takes, ranked or kept by rank."""
    return RADIX + 2 * row
