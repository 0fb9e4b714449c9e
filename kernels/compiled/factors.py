"""What experts' low-rank factors add to outputs, in one pass; ``mixmerge.bank.executors`` says what that is.

Shapes: n tokens, d inputs, o outputs, R ranks of all experts, E experts, P pairs of a token and an expert sorted by
expert, r the largest rank of one. Arrays are given as addresses: they are a tensor library's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

F32 = np.float32


@intrinsic  # type: ignore[untyped-decorator]
def _floats_at(context: Any, address: Any) -> Any:
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(types.int64), _pointer


@intrinsic  # type: ignore[untyped-decorator]
def _whole_at(context: Any, address: Any) -> Any:
    """An address as a pointer to int64."""
    return types.CPointer(types.int64)(types.int64), _pointer


def _pointer(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    return builder.inttoptr(given[0], context.get_value_type(signature.return_type))


@njit(fastmath={"reassoc", "contract"})
def _four_by_four(x0, x1, x2, x3, a0, a1, a2, a3):
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = F32(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = F32(0)
    for j in range(x0.size):
        v0, v1, v2, v3 = a0[j], a1[j], a2[j], a3[j]
        w0, w1, w2, w3 = x0[j], x1[j], x2[j], x3[j]
        s00 += w0 * v0
        s01 += w0 * v1
        s02 += w0 * v2
        s03 += w0 * v3
        s10 += w1 * v0
        s11 += w1 * v1
        s12 += w1 * v2
        s13 += w1 * v3
        s20 += w2 * v0
        s21 += w2 * v1
        s22 += w2 * v2
        s23 += w2 * v3
        s30 += w3 * v0
        s31 += w3 * v1
        s32 += w3 * v2
        s33 += w3 * v3
    return (s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23), (s30, s31, s32, s33)


@njit(fastmath={"reassoc", "contract"})
def _four_ranks(x, a0, a1, a2, a3):
    s0 = s1 = s2 = s3 = F32(0)
    for j in range(x.size):
        v = x[j]
        s0 += v * a0[j]
        s1 += v * a1[j]
        s2 += v * a2[j]
        s3 += v * a3[j]
    return s0, s1, s2, s3


@njit(fastmath={"reassoc", "contract"})
def _one(x, a):
    s = F32(0)
    for j in range(x.size):
        s += x[j] * a[j]
    return s


@njit(fastmath={"contract"})
def _add_four(y, z0, z1, z2, z3, b0, b1, b2, b3):
    for j in range(y.size):
        y[j] += (z0 * b0[j] + z1 * b1[j]) + (z2 * b2[j] + z3 * b3[j])


@njit(fastmath={"contract"})
def _add_four_by_four(y0, y1, y2, y3, z0, z1, z2, z3, b0, b1, b2, b3):
    z00, z01, z02, z03 = z0
    z10, z11, z12, z13 = z1
    z20, z21, z22, z23 = z2
    z30, z31, z32, z33 = z3
    for j in range(y0.size):
        v0, v1, v2, v3 = b0[j], b1[j], b2[j], b3[j]
        y0[j] += (z00 * v0 + z01 * v1) + (z02 * v2 + z03 * v3)
        y1[j] += (z10 * v0 + z11 * v1) + (z12 * v2 + z13 * v3)
        y2[j] += (z20 * v0 + z21 * v1) + (z22 * v2 + z23 * v3)
        y3[j] += (z30 * v0 + z31 * v1) + (z32 * v2 + z33 * v3)


@njit(fastmath={"contract"})
def _add_one(y, z, b):
    for j in range(y.size):
        y[j] += z * b[j]


@njit
def _keep(z, gain, i, sums):
    z[i], z[i + 1] = gain[i] * sums[0], gain[i + 1] * sums[1]
    z[i + 2], z[i + 3] = gain[i + 2] * sums[2], gain[i + 3] * sums[3]


@njit
def _four(z, i):
    return z[i], z[i + 1], z[i + 2], z[i + 3]


@njit
def add_pairs(inputs, outputs, given):
    """``outputs`` (n, o) += sum over pairs of gain * B^T (A ``inputs`` (n, d)).

    All are addresses. At ``given``: those of a (R, d), b (R, o), units (P,), bounds (E + 1,) of pairs, ranks (E + 1,),
    gains (P, r) and room for (P, r); then n, d, o, R, E, r and P.
    """
    places = carray(_whole_at(given), (14,))
    n, d, o, whole, count = places[7], places[8], places[9], places[10], places[11]
    wide, pairs = places[12], places[13]
    u, y = carray(_floats_at(inputs), (n, d)), carray(_floats_at(outputs), (n, o))
    a, b = carray(_floats_at(places[0]), (whole, d)), carray(_floats_at(places[1]), (whole, o))
    units = carray(_whole_at(places[2]), (pairs,))
    bounds, ranks = carray(_whole_at(places[3]), (count + 1,)), carray(_whole_at(places[4]), (count + 1,))
    gains, z = carray(_floats_at(places[5]), (pairs, wide)), carray(_floats_at(places[6]), (pairs, wide))
    for e in range(count):
        first, last, low, high = bounds[e], bounds[e + 1], ranks[e], ranks[e + 1]
        if first == last or low == high:
            continue
        fours = first + (last - first) // 4 * 4
        quads = low + (high - low) // 4 * 4
        for p in range(first, fours, 4):
            x0, x1, x2, x3 = u[units[p]], u[units[p + 1]], u[units[p + 2]], u[units[p + 3]]
            for k in range(low, quads, 4):
                s0, s1, s2, s3 = _four_by_four(x0, x1, x2, x3, a[k], a[k + 1], a[k + 2], a[k + 3])
                i = k - low
                _keep(z[p], gains[p], i, s0)
                _keep(z[p + 1], gains[p + 1], i, s1)
                _keep(z[p + 2], gains[p + 2], i, s2)
                _keep(z[p + 3], gains[p + 3], i, s3)
        for p in range(fours, last):
            x0 = u[units[p]]
            for k in range(low, quads, 4):
                _keep(z[p], gains[p], k - low, _four_ranks(x0, a[k], a[k + 1], a[k + 2], a[k + 3]))
        for p in range(first, last):
            for k in range(quads, high):
                z[p, k - low] = gains[p, k - low] * _one(u[units[p]], a[k])
        for p in range(first, fours, 4):
            y0, y1, y2, y3 = y[units[p]], y[units[p + 1]], y[units[p + 2]], y[units[p + 3]]
            for k in range(low, quads, 4):
                i = k - low
                s0, s1, s2, s3 = _four(z[p], i), _four(z[p + 1], i), _four(z[p + 2], i), _four(z[p + 3], i)
                _add_four_by_four(y0, y1, y2, y3, s0, s1, s2, s3, b[k], b[k + 1], b[k + 2], b[k + 3])
        for p in range(fours, last):
            y0 = y[units[p]]
            for k in range(low, quads, 4):
                s0 = _four(z[p], k - low)
                _add_four(y0, s0[0], s0[1], s0[2], s0[3], b[k], b[k + 1], b[k + 2], b[k + 3])
        for p in range(first, last):
            for k in range(quads, high):
                _add_one(y[units[p]], z[p, k - low], b[k])
