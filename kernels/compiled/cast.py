"""Stored bytes to float32 and back, on the CPU, for blocks that fit the cache. Rounding is to nearest even.

n elements of a block. Codes of dtypes are ``layout.CODES``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

U16, U32, F32 = np.uint16, np.uint32, np.float32
_SIGN16, _SIGN32, _ABS32 = U32(0x8000), U32(0x80000000), U32(0x7FFFFFFF)
_INF32 = U32(0x7F800000)


@njit
def _decode_bf16(source, bits):
    for i in range(bits.size):
        bits[i] = U32(source[i]) << U32(16)


@njit
def _decode_f16(source, bits, values):
    # Shifted into float32's fields, a half is 2**112 too small; one exact multiplication mends it, subnormals
    # included. Only Inf and NaN have to be told apart.
    for i in range(bits.size):
        bits[i] = (U32(source[i]) & U32(0x7FFF)) << U32(13)
    for i in range(values.size):
        values[i] = values[i] * F32(5.192296858534828e33)
    for i in range(bits.size):
        half = U32(source[i])
        special = _INF32 | ((half & U32(0x3FF)) << U32(13))
        magnitude = special if (half & U32(0x7C00)) == U32(0x7C00) else bits[i]
        bits[i] = magnitude | ((half & _SIGN16) << U32(16))


@njit
def _copy_bits(source, bits):
    for i in range(bits.size):
        bits[i] = source[i]


@njit
def largest(bits):
    """The largest of ``|x|`` as bits."""
    top = U32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & _ABS32)
    return top


@njit
def _largest_half(halves):
    top = U16(0)
    for i in range(halves.size):
        half = U16(halves[i] & U16(0x7FFF))
        top = half if half > top else top
    return U32(top)


@njit
def _half_top(top):
    """A half's magnitude bits on float32's scale, as far as "finite or not" goes."""
    return _INF32 if top >= U32(0x7C00) else top


@njit
def decode(code, raw, start, values):
    """Elements ``start`` to ``start + n`` of ``raw`` (bytes) into ``values`` (float32, n). Returns the largest
    magnitude's bits: 0x7F800000 or more means Inf or NaN."""
    bits = values.view(np.uint32)
    stop = start + values.size
    if code == 0:
        halves = raw.view(np.uint16)[start:stop]
        _decode_bf16(halves, bits)
        return _largest_half(halves) << U32(16)
    if code == 1:
        halves = raw.view(np.uint16)[start:stop]
        _decode_f16(halves, bits, values)
        return _half_top(_largest_half(halves))
    _copy_bits(raw.view(np.uint32)[start:stop], bits)
    return largest(bits)


@njit
def _encode_bf16(bits, target):
    for i in range(bits.size):
        v = bits[i]
        target[i] = U16((v + U32(0x7FFF) + ((v >> U32(16)) & U32(1))) >> U32(16))


@njit
def _encode_f16(bits, target):
    # Normal halves round the 13 dropped bits; below 2**-14 the addition of 0.5 (in units where the half's
    # smallest step is float32's last place) lets the hardware do the rounding.
    for i in range(bits.size):
        v = bits[i]
        sign = (v >> U32(16)) & _SIGN16
        magnitude = v & _ABS32
        normal = (magnitude - U32(0x38000000) + U32(0xFFF) + ((magnitude >> U32(13)) & U32(1))) >> U32(13)
        big = min(normal, U32(0x7C00))
        target[i] = U16(sign | (U32(0x7E00) if magnitude > _INF32 else big))


@njit
def _encode_f16_small(bits, values, target):
    for i in range(bits.size):
        magnitude = bits[i] & _ABS32
        if magnitude < U32(0x38800000):
            steps = np.rint(np.float64(abs(values[i])) * 16777216.0)
            target[i] = U16(((bits[i] >> U32(16)) & _SIGN16) | U32(steps))


@njit
def encode(code, values, raw, start):
    """``values`` (float32, n) into elements ``start`` to ``start + n`` of ``raw``. Returns the largest
    magnitude's bits as written, widened to float32."""
    bits = values.view(np.uint32)
    stop = start + values.size
    if code == 0:
        written = raw.view(np.uint16)[start:stop]
        _encode_bf16(bits, written)
        return _largest_half(written) << U32(16)
    if code == 1:
        written = raw.view(np.uint16)[start:stop]
        _encode_f16(bits, written)
        _encode_f16_small(bits, values, written)
        return _half_top(_largest_half(written))
    _copy_bits(bits, raw.view(np.uint32)[start:stop])
    return largest(bits)
