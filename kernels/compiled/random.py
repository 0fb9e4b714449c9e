"""Philox draws and keep-masks for the CPU kernels; ``philox.py`` is the plain reference and the definition."""

from __future__ import annotations

import numpy as np
from numba import njit

U32, U64 = np.uint32, np.uint64
_M0, _M1 = U64(0xD2511F53), U64(0xCD9E8D57)
_W0, _W1 = U32(0x9E3779B9), U32(0xBB67AE85)


@njit
def _rounds(first, count, stream, words):
    high = U32(first >> U64(32)) | (stream[2] << U32(16))
    low = U32(first & U64(0xFFFFFFFF))
    k0, k1, n0, n1 = stream[0], stream[1], stream[3], stream[4]
    for i in range(count):
        x0, x1, x2, x3 = U32(low + U32(i)), high, n0, n1
        a, b = k0, k1
        for _ in range(10):
            p0, p1 = _M0 * U64(x0), _M1 * U64(x2)
            y0 = U32(p1 >> U64(32)) ^ x1 ^ a
            y2 = U32(p0 >> U64(32)) ^ x3 ^ b
            x1, x3 = U32(p1 & U64(0xFFFFFFFF)), U32(p0 & U64(0xFFFFFFFF))
            x0, x2 = y0, y2
            a, b = U32(a + _W0), U32(b + _W1)
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = x0, x1, x2, x3


@njit
def draw_block(stream, start, draws, words):
    """The draws of elements ``start`` to ``start + n`` into ``draws`` (uint32, n).

    ``stream`` is (seed low, seed high, expert, name low, name high), ``words`` scratch (4 * DRAW_BLOCKS)
    with n <= 4 * DRAW_BLOCKS - 8. The low counter word may not wrap inside one call: callers' blocks are aligned.
    """
    n = draws.size
    first = start // 4
    skip = start - 4 * first
    _rounds(U64(first), (start + n + 3) // 4 - first, stream, words)
    wanted = words[skip : skip + n]
    for i in range(n):
        draws[i] = wanted[i]
