"""Inner products of a gradient with deltas, and weights mixed from them, in one pass over inputs where they lie.

n elements of the chunk, T experts, row 0 of the inputs is the base, B block length, LANES partial sums. Inputs are
addresses in memory, for each lies in a mapped file of its own. ``masks`` (T, bytes) has a bit for every element of the
tensor whose delta is kept, lowest first, or no row where all are; ``scratch`` is (4, B + 8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mixmerge.kernels.compiled.cast import decode, encode
from mixmerge.kernels.compiled.combine import _sum_lanes, _zero, keep_bits
from mixmerge.kernels.compiled.stored import halves, minus, number
from mixmerge.kernels.layout import BLOCK, LANES

F32, F64 = np.float32, np.float64


@intrinsic  # type: ignore[untyped-decorator]
def _place(context: Any, address: Any) -> Any:
    """An address as a pointer to bytes."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], cgutils.voidptr_t)

    return types.CPointer(types.uint8)(types.int64), generate


@njit
def _bytes(address, elements):
    """Room for so many elements of the widest dtype at an address; a narrower one takes the first part of it."""
    return carray(_place(address), (4 * elements,))


@njit
def _add_dot(stored, base, gradient, lanes):
    whole = base.size // LANES * LANES
    for s in range(0, whole, LANES):
        x, b, g = stored[s : s + LANES], base[s : s + LANES], gradient[s : s + LANES]
        for i in range(LANES):
            lanes[i] += (number(x[i]) - b[i]) * g[i]
    for i in range(whole, base.size):
        lanes[i - whole] += (number(stored[i]) - base[i]) * gradient[i]


@njit
def _kept(code, raw, first, base, mask, values, spare):
    """The delta from element ``first`` on, 0 where the mask has no bit; a part of ``values`` (B + 8), which begins
    with what else is in the first byte of the mask."""
    lead = first % 8
    delta = values[lead : lead + base.size]
    minus(code, raw, first, base, delta)
    for i in range(lead):
        values[i] = F32(0)
    keep_bits(values[: lead + base.size], mask, first - lead, spare)
    return delta


@njit
def _add_product(delta, gradient, lanes):
    whole = delta.size // LANES * LANES
    for s in range(0, whole, LANES):
        d, g = delta[s : s + LANES], gradient[s : s + LANES]
        for i in range(LANES):
            lanes[i] += d[i] * g[i]
    for i in range(whole, delta.size):
        lanes[i - whole] += delta[i] * gradient[i]


@njit
def _widen(lanes, wide):
    for i in range(LANES):
        wide[i] += F64(lanes[i])


@njit
def gradient_products(inputs, codes, masks, start, n, gradient, gradient_code, scratch, lanes, wide, sums):
    """<gradient, what is kept of input k - base> of n elements from ``start`` on into ``sums`` (T), for every expert k.

    ``inputs`` (T + 1) addresses, ``codes`` (T + 1); ``gradient`` (bytes) holds just the n elements. Sums are float32
    within a block, B / LANES terms long, and float64 from there. ``lanes`` (LANES), ``wide`` (T, LANES).
    """
    experts = codes.size - 1
    wide[:] = 0
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        first = start + s
        base, slope = scratch[0][:m], scratch[1][:m]
        decode(codes[0], _bytes(inputs[0], first + m), first, base)
        decode(gradient_code, gradient, s, slope)
        for k in range(experts):
            code, raw = codes[k + 1], _bytes(inputs[k + 1], first + m)
            _zero(lanes)
            if masks.shape[0]:
                delta = _kept(code, raw, first, base, masks[k], scratch[2], scratch[3])
                _add_product(delta, slope, lanes)
            elif code == 0:
                _add_dot(halves(raw, first, m), base, slope, lanes)
            else:
                values = scratch[2][:m]
                decode(code, raw, first, values)
                _add_dot(values.view(np.uint32), base, slope, lanes)
            _widen(lanes, wide[k])
    for k in range(experts):
        sums[k] = _sum_lanes(wide[k])


@njit
def _add_moved(stored, base, factor, total):
    for i in range(total.size):
        total[i] += factor * (number(stored[i]) - base[i])


@njit
def mixed_chunk(inputs, codes, masks, start, n, factors, out, out_code, scratch):
    """out = base + sum of factors[k] * what is kept of (input k - base), of n elements from ``start`` on, in float32 in
    this order.

    ``inputs`` (T + 1) addresses, ``codes`` (T + 1), ``factors`` (T); ``out`` (bytes) has room for just the n elements.
    """
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        first = start + s
        base, total = scratch[0][:m], scratch[1][:m]
        decode(codes[0], _bytes(inputs[0], first + m), first, base)
        _zero(total)
        for k in range(factors.size):
            code, raw = codes[k + 1], _bytes(inputs[k + 1], first + m)
            if masks.shape[0]:
                delta = _kept(code, raw, first, base, masks[k], scratch[2], scratch[3])
                for i in range(m):
                    total[i] += factors[k] * delta[i]
            elif code == 0:
                _add_moved(halves(raw, first, m), base, factors[k], total)
            else:
                values = scratch[2][:m]
                decode(code, raw, first, values)
                _add_moved(values.view(np.uint32), base, factors[k], total)
        for i in range(m):
            total[i] = base[i] + total[i]
        encode(out_code, total, out, s)
