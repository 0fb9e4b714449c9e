"""Inner products of a gradient with deltas, and weights mixed from them, by their plain definitions.

n elements, T experts; base ``(n,)``, experts ``(T, n)``, float32. The loops are ``gradient_products`` and
``mixed_chunk``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def gradient_products_reference(base: Floats, experts: Floats, gradient: Floats) -> NDArray[np.float64]:
    """``(T,)``: <gradient, expert - base>, the differences rounded to float32, the sums in float64."""
    products: NDArray[np.float64] = (experts - base).astype(np.float64) @ gradient.astype(np.float64)
    return products


def mixed_reference(base: Floats, experts: Floats, factors: Floats) -> Floats:
    """``(n,)``: base + sum of factors * (expert - base); every step is rounded to float32, in the order given."""
    total = np.zeros_like(base)
    for factor, expert in zip(factors, experts, strict=True):
        total += factor * (expert - base)
    mixed: Floats = base + total
    return mixed
