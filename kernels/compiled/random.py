"""Philox draws for the CPU kernels; ``philox.py`` is the plain reference and the definition.

Two blocks hold the draws of eight elements, the first their upper halves, the second their lower halves.
"""

from __future__ import annotations

import numpy as np
from numba import njit

U16, U32, U64 = np.uint16, np.uint32, np.uint64
_M0, _M1 = U64(0xD2511F53), U64(0xCD9E8D57)
_W0, _W1 = U32(0x9E3779B9), U32(0xBB67AE85)


@njit
def _rounds(first, count, stream, words):
    """Every other of the blocks from ``first`` on, ``count`` of them, into ``words``."""
    high = U32(first >> U64(32)) | (stream[2] << U32(16))
    low = U32(first & U64(0xFFFFFFFF))
    k0, k1, n0, n1 = stream[0], stream[1], stream[3], stream[4]
    for i in range(count):
        x0, x1, x2, x3 = U32(low + U32(2) * U32(i)), high, n0, n1
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
def halves_of_draws(stream, start, which, halves, words):
    """The upper (``which`` 0) or lower (1) halves of the draws of elements ``start`` to ``start + n`` into ``halves``
    (uint16, n).

    ``stream`` is (seed low, seed high, expert, name low, name high), ``words`` scratch (2 * DRAW_BLOCKS) with
    n <= 4 * DRAW_BLOCKS - 16. The low counter word may not wrap inside one call: callers' blocks are aligned.
    """
    n, first = halves.size, start // 8
    skip = start - 8 * first
    _rounds(U64(2 * first + which), (start + n + 7) // 8 - first, stream, words)
    wanted = words.view(np.uint16)[skip : skip + n]
    for i in range(n):
        halves[i] = wanted[i]


@njit
def draw_block(stream, start, draws, words):
    """The draws of elements ``start`` to ``start + n`` into ``draws`` (uint32, n). ``words`` is scratch
    (4 * DRAW_BLOCKS); the rest as in ``halves_of_draws``."""
    n, first, room = draws.size, start // 8, words.size // 2
    skip, count = start - 8 * first, (start + n + 7) // 8 - first
    _rounds(U64(2 * first), count, stream, words[:room])
    _rounds(U64(2 * first + 1), count, stream, words[room:])
    upper = words[:room].view(np.uint16)[skip : skip + n]
    lower = words[room:].view(np.uint16)[skip : skip + n]
    for i in range(n):
        draws[i] = U32(U32(upper[i]) << U32(16)) | U32(lower[i])
