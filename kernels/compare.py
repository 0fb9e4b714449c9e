"""How experts differ, by its plain definition; the loop is ``compare_chunk``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def compare_reference(
    base: NDArray[np.floating], deltas: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.int64], float, int]:
    """The plain definition of ``compare_chunk``, for any floats: base ``(n,)``, deltas ``(E, n)``.

    Returns:
        products ``(E, E)``, counts ``(E, E)``, both upper triangles only; the base's sum of squares; conflicts.
    """
    wide = deltas.astype(np.float64)
    signs = np.sign(wide).astype(np.int64)  # (E, n)
    agree = signs[:, None] * signs[None, :]  # (E, E, n)
    counts = np.count_nonzero(agree == -1, axis=2)
    np.fill_diagonal(counts, np.count_nonzero(signs == 0, axis=1))
    both = (signs == 1).any(axis=0) & (signs == -1).any(axis=0)
    square = float(np.square(base.astype(np.float64)).sum())
    return np.triu(wide @ wide.T), np.triu(counts), square, int(both.sum())
