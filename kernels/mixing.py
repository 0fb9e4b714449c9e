"""Inner products of a gradient with deltas, and weights mixed from them, by their plain definitions.

n elements, T experts; base ``(n,)``, experts ``(T, n)``, float32; kept ``(T, n)`` bool, or None where all deltas are
kept whole. The loops are ``gradient_products`` and ``mixed_chunk``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kept = NDArray[np.bool_]


def _kept(deltas: Floats, kept: Kept | None) -> Floats:
    found: Floats = deltas if kept is None else np.where(kept, deltas, np.float32(0))
    return found


def gradient_products_reference(
    base: Floats, experts: Floats, gradient: Floats, kept: Kept | None = None
) -> NDArray[np.float64]:
    """``(T,)``: <gradient, kept (expert - base)>, the differences rounded to float32, the sums in float64."""
    deltas = _kept(experts - base, kept).astype(np.float64)
    products: NDArray[np.float64] = deltas @ gradient.astype(np.float64)
    return products


def mixed_reference(base: Floats, experts: Floats, factors: Floats, kept: Kept | None = None) -> Floats:
    """``(n,)``: base + sum of factors * kept (expert - base); every step is rounded to float32, in the order given."""
    total = np.zeros_like(base)
    for factor, delta in zip(factors, _kept(experts - base, kept), strict=True):
        total += factor * delta
    mixed: Floats = base + total
    return mixed
