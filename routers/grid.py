"""Embeddings whose products are exact. N rows, D dimensions.

Entries are rounded to multiples of ``STEP``. The product of two is then a multiple of ``STEP ** 2``, and so is every
partial sum; of vectors of unit length they stay below 2, so float32 holds each exactly. Similarities are therefore the
same whatever the order of the sum and the size of the batch, and so are the neighbours. float16 holds the entries
exactly too, which halves what is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP = 2.0**-11


def on_grid(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of at most unit length, rounded to multiples of ``STEP``."""
    return np.asarray(
        np.round(np.asarray(rows, np.float32) / np.float32(STEP)) * np.float32(STEP), np.float32
    )
