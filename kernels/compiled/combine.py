"""Fused CPU loops over one chunk of one tensor: weighted sums, masked deltas, sign election, norms.

n elements of the chunk, E inputs (row 0 is the base where there is one), K = E - 1 experts, B block length.
Everything a block needs fits the second-level cache, so a chunk is read and written once.
The plain definitions are ``mixmerge.methods``; sums run in the recipe's order, in float32.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixmerge.kernels.compiled.cast import decode, encode
from mixmerge.kernels.compiled.stored import add_kept, difference, halves, minus, number, plus, times
from mixmerge.kernels.layout import BLOCK, KEEP_BITS, KEEP_CUT, LANES

U8, U32, F32, F64 = np.uint8, np.uint32, np.float32, np.float64

# The bits of a byte as eight bytes of -1 or 0, lowest first.
_SPREAD = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.uint8) * np.uint8(255)
_SPREAD = np.ascontiguousarray(_SPREAD).view(np.uint64).reshape(-1)


@njit
def _scale_and_add(delta, factor, weight, total):
    for i in range(delta.size):
        delta[i] = (delta[i] * factor) * weight
        total[i] += delta[i]


@njit
def _zero(target):
    for i in range(target.size):
        target[i] = F32(0)


@njit
def linear_chunk(raw, codes, n, factors, out, out_code, scratch, seen):
    """out = sum of factors[e] * input e. ``raw`` (E, bytes), ``scratch`` (2, B), ``seen`` (E + 1) uint32:
    the largest magnitude's bits of every input and of the output."""
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        total, values = scratch[0][:m], scratch[1][:m]
        for e in range(codes.size):
            if e == 0:
                top = times(codes[e], raw[e], s, factors[e], total)
            else:
                top = plus(codes[e], raw[e], s, factors[e], total, values)
            seen[e] = max(seen[e], top)
        seen[codes.size] = max(seen[codes.size], encode(out_code, total, out, s))


@njit
def delta_block(raw, codes, direct, e, s, base, delta):
    """The delta of expert ``e`` (a row of ``raw``) for one block; ``direct`` rows already hold deltas.
    Returns the largest magnitude's bits of what was read."""
    if direct[e]:
        return decode(codes[e], raw[e], s, delta)
    return minus(codes[e], raw[e], s, base, delta)


@njit
def deltas_chunk(raw, codes, direct, expert, start, deltas, base):
    """The deltas of one expert from element ``start`` of the chunk on. ``base`` (B) is scratch."""
    if codes[0] == 0 and codes[expert] == 0 and not direct[expert]:
        difference(halves(raw[expert], start, deltas.size), halves(raw[0], start, deltas.size), deltas)
        return
    for s in range(0, deltas.size, BLOCK):
        m = min(BLOCK, deltas.size - s)
        if not direct[expert]:
            decode(codes[0], raw[0], start + s, base[:m])
        delta_block(raw, codes, direct, expert, start + s, base[:m], deltas[s : s + m])


@njit
def keep_cut(delta, first, cut):
    """Zero what lies outside a band of the order (|delta|, -index).

    ``cut`` is (low bits, low index, high bits, high index): kept is what is at least (low bits, low index)
    and below (high bits, high index). ``first`` is the index of ``delta[0]`` in the tensor.
    """
    bits = delta.view(np.uint32)
    plain, low, high = _limits(first, delta.size, cut)
    if plain:
        for i in range(delta.size):
            b = bits[i] & U32(0x7FFFFFFF)
            delta[i] = delta[i] if (b >= low) & (b < high) else F32(0)
        return
    low_bits, low_index, high_bits, high_index = cut[0], cut[1], cut[2], cut[3]
    for i in range(delta.size):
        b = np.int64(bits[i] & U32(0x7FFFFFFF))
        above_low = b > low_bits or (b == low_bits and first + i <= low_index)
        above_high = b > high_bits or (b == high_bits and first + i <= high_index)
        if above_high or not above_low:
            delta[i] = F32(0)


@njit
def _limits(first, size, cut):
    """Whether plain thresholds do for a block, for all of it is on one side of the ties' index limits; those."""
    last = first + size - 1
    low_bits, low_index, high_bits, high_index = cut[0], cut[1], cut[2], cut[3]
    low = U32(low_bits if last <= low_index else min(low_bits + 1, 0xFFFFFFFF))
    high = U32(high_bits if last <= high_index else min(high_bits + 1, 0xFFFFFFFF))
    return not (first <= low_index < last or first <= high_index < last), low, high


@njit
def _and_flags(bits, flags):
    # A flag of -1 widens to all ones.
    for i in range(bits.size):
        bits[i] &= U32(np.int32(flags[i]))


@njit
def keep_bits(delta, mask, s, spare):
    """Zero what has no bit in ``mask``; ``s`` is a multiple of 8. ``spare`` (B) float32."""
    bits = delta.view(np.uint32)
    words = spare.view(np.uint64)[: (bits.size + 7) // 8]
    part = mask[s // 8 : s // 8 + words.size]
    for j in range(words.size):
        words[j] = _SPREAD[part[j]]
    _and_flags(bits, words.view(np.int8)[: bits.size])


@njit
def _elect(deltas, experts, weights, normalize, total, agreed):
    """``total``, the sum of the weighted deltas, becomes the sum of those that agree with it in sign; over their
    weights if ``normalize``."""
    m = total.size
    sign = deltas[experts + 1][:m]
    for i in range(m):
        sign[i] = F32(1) if total[i] >= F32(0) else F32(-1)
    _zero(total)
    _zero(agreed)
    for k in range(experts):
        delta, weight = deltas[k + 1][:m], weights[k]
        for i in range(m):
            agrees = delta[i] * sign[i] > F32(0)
            total[i] += delta[i] if agrees else F32(0)
            agreed[i] += weight if agrees else F32(0)
    if normalize:
        for i in range(m):
            total[i] /= agreed[i] if agreed[i] != F32(0) else F32(1)


@njit
def combine_chunk(
    raw, codes, direct, n, first, weights, factors, keep, cuts, masks, elect, normalize, divisor, scale,
    out, out_code, scratch, seen,
):  # fmt: skip
    """out = base + scale * consensus of weights[k] * factors[k] * kept delta k.

    ``first`` is the chunk's first index in the tensor, ``keep`` (K) one of KEEP_*, ``cuts`` (K, 4),
    ``masks`` (K, bytes), ``scratch`` (E + 4, B), ``seen`` (E + 1) as in ``linear_chunk``.
    """
    experts = codes.size - 1
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base = scratch[0][:m]
        seen[0] = max(seen[0], decode(codes[0], raw[0], s, base))
        total, spare = scratch[experts + 2][:m], scratch[experts + 3][:m]
        _zero(total)
        for k in range(experts):
            delta = scratch[k + 1][:m] if elect else spare
            plain, low, high = _limits(first + s, m, cuts[k])
            if plain and not direct[k + 1] and keep[k] != KEEP_BITS:
                top = add_kept(
                    codes[k + 1], raw[k + 1], s, base, low, high, factors[k], weights[k], delta, total
                )
            else:
                top = delta_block(raw, codes, direct, k + 1, s, base, delta)
                if keep[k] == KEEP_CUT:
                    keep_cut(delta, first + s, cuts[k])
                elif keep[k] == KEEP_BITS:
                    keep_bits(delta, masks[k], s, scratch[experts + 4])
                _scale_and_add(delta, factors[k], weights[k], total)
            seen[k + 1] = max(seen[k + 1], top)
        if elect:
            _elect(scratch, experts, weights, normalize, total, spare)
        elif normalize:
            for i in range(m):
                total[i] /= divisor
        for i in range(m):
            total[i] = base[i] + scale * total[i]
        seen[experts + 1] = max(seen[experts + 1], encode(out_code, total, out, s))


@njit
def _sum_lanes(lanes):
    total = F64(0)
    for i in range(lanes.size):
        total += lanes[i]
    return total


@njit
def _add_magnitudes(values, lanes):
    whole = values.size // LANES * LANES
    for s in range(0, whole, LANES):
        part = values[s : s + LANES]
        for i in range(LANES):
            lanes[i] += F64(abs(part[i]))
    for i in range(whole, values.size):
        lanes[i - whole] += F64(abs(values[i]))


@njit
def magnitudes_chunk(raw, codes, direct, n, first, expert, keep, cut, mask, scratch, lanes, sums):
    """L1 norm of one expert's delta and of what is kept of it into ``sums`` (2).

    ``scratch`` (3, B), ``lanes`` (2, LANES) float64.
    """
    every, kept = lanes[0], lanes[1]
    every[:] = kept[:] = 0
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        base, delta = scratch[0][:m], scratch[1][:m]
        deltas_chunk(raw, codes, direct, expert, s, delta, base)
        _add_magnitudes(delta, every)
        if keep == KEEP_CUT:
            keep_cut(delta, first + s, cut)
        elif keep == KEEP_BITS:
            keep_bits(delta, mask, s, scratch[2])
        _add_magnitudes(delta, kept)
    sums[0], sums[1] = _sum_lanes(every), _sum_lanes(kept)


@njit
def _add_products(a, b, lanes):
    whole = a.size // LANES * LANES
    for s in range(0, whole, LANES):
        left, right = a[s : s + LANES], b[s : s + LANES]
        for i in range(LANES):
            lanes[i] += F64(left[i]) * F64(right[i])
    for i in range(whole, a.size):
        lanes[i - whole] += F64(a[i]) * F64(b[i])


# Products of two float32 are exact in float64, so contraction changes no bit.
@njit(fastmath={"contract"})
def _add_three(a, b, aa, bb, ab):
    whole = a.size // (4 * LANES) * (4 * LANES)
    for s in range(0, whole, 4 * LANES):
        t, u, v, w = s + LANES, s + 2 * LANES, s + 3 * LANES, s + 4 * LANES
        a0, a1, a2, a3 = a[s:t], a[t:u], a[u:v], a[v:w]
        b0, b1, b2, b3 = b[s:t], b[t:u], b[u:v], b[v:w]
        for i in range(LANES):
            x0, x1, x2, x3 = F64(number(a0[i])), F64(number(a1[i])), F64(number(a2[i])), F64(number(a3[i]))
            y0, y1, y2, y3 = F64(number(b0[i])), F64(number(b1[i])), F64(number(b2[i])), F64(number(b3[i]))
            aa[i] += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
            bb[i] += (y0 * y0 + y1 * y1) + (y2 * y2 + y3 * y3)
            ab[i] += (x0 * y0 + x1 * y1) + (x2 * y2 + x3 * y3)
    for i in range(whole, a.size):
        x, y = F64(number(a[i])), F64(number(b[i]))
        aa[0] += x * x
        bb[0] += y * y
        ab[0] += x * y


@njit
def products_chunk(raw, codes, n, scratch, lanes, sums):
    """<a, a>, <b, b> and <a, b> of two inputs into ``sums`` (3). ``scratch`` (2, B), ``lanes`` (3, LANES) float64."""
    aa, bb, ab = lanes[0], lanes[1], lanes[2]
    aa[:] = bb[:] = ab[:] = 0
    for s in range(0, n, BLOCK):
        m = min(BLOCK, n - s)
        if codes[0] == 0 and codes[1] == 0:
            halves = raw[0].view(np.uint16)[s : s + m], raw[1].view(np.uint16)[s : s + m]
            _add_three(halves[0], halves[1], aa, bb, ab)
        else:
            a, b = scratch[0][:m], scratch[1][:m]
            decode(codes[0], raw[0], s, a)
            decode(codes[1], raw[1], s, b)
            _add_three(a.view(np.uint32), b.view(np.uint32), aa, bb, ab)
    sums[0], sums[1], sums[2] = _sum_lanes(aa), _sum_lanes(bb), _sum_lanes(ab)
