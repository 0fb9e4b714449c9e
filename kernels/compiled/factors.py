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
def _four_pairs(a, x0, x1, x2, x3):
    s0 = s1 = s2 = s3 = F32(0)
    for j in range(a.size):
        v = a[j]
        s0 += v * x0[j]
        s1 += v * x1[j]
        s2 += v * x2[j]
        s3 += v * x3[j]
    return s0, s1, s2, s3


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
def _add_one(y, z, b):
    for j in range(y.size):
        y[j] += z * b[j]


@njit
def add_pairs(inputs, outputs, places, sizes):  # .., .., (7,), (7,)
    """``outputs`` (n, o) += sum over pairs of gain * B^T (A ``inputs`` (n, d)).

    ``places``: addresses of a (R, d), b (R, o), units (P,), bounds (E + 1,) of pairs, ranks (E + 1,), gains (P, r)
    and room for (P, r). ``sizes``: n, d, o, R, E, r, P.
    """
    n, d, o, whole, count, wide, pairs = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]
    u, y = carray(_floats_at(inputs), (n, d)), carray(_floats_at(outputs), (n, o))
    a, b = carray(_floats_at(places[0]), (whole, d)), carray(_floats_at(places[1]), (whole, o))
    units = carray(_whole_at(places[2]), (pairs,))
    bounds, ranks = carray(_whole_at(places[3]), (count + 1,)), carray(_whole_at(places[4]), (count + 1,))
    gains, z = carray(_floats_at(places[5]), (pairs, wide)), carray(_floats_at(places[6]), (pairs, wide))
    for e in range(count):
        first, last, low, high = bounds[e], bounds[e + 1], ranks[e], ranks[e + 1]
        if first == last or low == high:
            continue
        p = first
        while p + 4 <= last:
            x0, x1, x2, x3 = u[units[p]], u[units[p + 1]], u[units[p + 2]], u[units[p + 3]]
            for k in range(low, high):
                s0, s1, s2, s3 = _four_pairs(a[k], x0, x1, x2, x3)
                z[p, k - low], z[p + 1, k - low], z[p + 2, k - low], z[p + 3, k - low] = s0, s1, s2, s3
            p += 4
        while p < last:
            x0, k = u[units[p]], low
            while k + 4 <= high:
                s0, s1, s2, s3 = _four_ranks(x0, a[k], a[k + 1], a[k + 2], a[k + 3])
                i = k - low
                z[p, i], z[p, i + 1], z[p, i + 2], z[p, i + 3] = s0, s1, s2, s3
                k += 4
            while k < high:
                z[p, k - low] = _one(x0, a[k])
                k += 1
            p += 1
        for p in range(first, last):
            out, mine, gain, k = y[units[p]], z[p], gains[p], low
            while k + 4 <= high:
                i = k - low
                _add_four(
                    out, gain[i] * mine[i], gain[i + 1] * mine[i + 1], gain[i + 2] * mine[i + 2],
                    gain[i + 3] * mine[i + 3], b[k], b[k + 1], b[k + 2], b[k + 3],
                )  # fmt: skip
                k += 4
            while k < high:
                _add_one(out, gain[k - low] * mine[k - low], b[k])
                k += 1
