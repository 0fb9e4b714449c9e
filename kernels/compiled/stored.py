"""Loops that read stored bfloat16 and float32 where they lie: one pass instead of a cast and then a sum.

n elements of a block. Codes as in ``cast``; float16, which takes several steps to decode, goes through a spare
block. All return the largest magnitude's bits of what was read, as ``cast.decode`` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mixmerge.kernels.compiled.cast import decode
from mixmerge.kernels.native import host

U32, F32 = np.uint32, np.float32
_BITS = ir.IntType(32)
_VECTOR, _WORD = ir.VectorType(_BITS, 16), ir.IntType(64)
# Whether ``choose_16`` is one instruction of this CPU.
WIDE = "+avx512f" in host()[1].split(",")


@intrinsic  # type: ignore[untyped-decorator]
def number(context: Any, bits: Any) -> Any:
    """The float32 whose bits a uint32 holds, or whose upper half a uint16 (bfloat16) does."""

    def half(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        wide = builder.shl(builder.zext(given[0], _BITS), ir.Constant(_BITS, 16))
        return builder.bitcast(wide, ir.FloatType())

    def whole(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.FloatType())

    if bits not in (types.uint16, types.uint32):
        return None
    return types.float32(bits), half if bits == types.uint16 else whole


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(context: Any, value: Any) -> Any:
    """The bits of a float32, as a uint32."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], _BITS)

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def magnitude(context: Any, bits: Any) -> Any:
    """Stored bits, uint16 or uint32, without their sign."""
    if bits not in (types.uint16, types.uint32):
        return None
    last = bits.bitwidth - 1

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.and_(given[0], ir.Constant(given[0].type, (1 << last) - 1))

    return bits(bits), generate


@intrinsic  # type: ignore[untyped-decorator]
def lowest_bit(context: Any, word: Any) -> Any:
    """The place of the lowest set bit of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.cttz(given[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def choose_16(context: Any, draws: Any, start: Any, low: Any, span: Any, chosen: Any, found: Any) -> Any:
    """Of the 16 ``draws`` (uint32) from ``start`` on, the indices of those from ``low`` to ``low + span`` into
    ``chosen`` from ``found`` on; returns how many."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        def spread(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_BITS, 0))
            return builder.shuffle_vector(one, one, ir.Constant(_VECTOR, [0] * 16))

        source = context.make_array(signature.args[0])(context, builder, given[0]).data
        target = context.make_array(signature.args[4])(context, builder, given[4]).data
        place = builder.bitcast(builder.gep(source, [given[1]]), _VECTOR.as_pointer())
        above = builder.sub(builder.load(place, align=4), spread(given[2]))
        inside = builder.icmp_unsigned("<=", above, spread(given[3]))
        indices = builder.add(spread(builder.trunc(given[1], _BITS)), ir.Constant(_VECTOR, list(range(16))))
        kind = ir.FunctionType(ir.VoidType(), [_VECTOR, _BITS.as_pointer(), inside.type])
        store = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v16i32")
        builder.call(store, [indices, builder.gep(target, [given[5]]), inside])
        return builder.zext(builder.ctpop(builder.bitcast(inside, ir.IntType(16))), _WORD)

    word, half = types.uint64, types.uint32
    return word(draws, word, half, half, chosen, word), generate


@njit
def _times(stored, factor, total):
    top = magnitude(stored[0])
    for i in range(total.size):
        size = magnitude(stored[i])
        top = size if size > top else top
        total[i] = factor * number(stored[i])
    return top


@njit
def _plus(stored, factor, total):
    top = magnitude(stored[0])
    for i in range(total.size):
        size = magnitude(stored[i])
        top = size if size > top else top
        total[i] += factor * number(stored[i])
    return top


@njit
def _minus(stored, base, delta):
    top = magnitude(stored[0])
    for i in range(delta.size):
        size = magnitude(stored[i])
        top = size if size > top else top
        delta[i] = number(stored[i]) - base[i]
    return top


@njit
def difference(stored, base, delta):
    """delta = stored - base, of stored bfloat16."""
    for i in range(delta.size):
        delta[i] = number(stored[i]) - number(base[i])


@njit
def _add_kept(stored, base, low, high, factor, weight, delta, total):
    top = magnitude(stored[0])
    for i in range(total.size):
        size = magnitude(stored[i])
        top = size if size > top else top
        moved = number(stored[i]) - base[i]
        kept = magnitude(bits_of(moved))
        moved = moved if (kept >= low) & (kept < high) else F32(0)
        moved = (moved * factor) * weight
        delta[i] = moved
        total[i] += moved
    return top


@njit
def halves(raw, start, n):
    return raw.view(np.uint16)[start : start + n]


@njit
def _words(raw, start, n):
    return raw.view(np.uint32)[start : start + n]


@njit
def times(code, raw, start, factor, total):
    """total = factor * the elements of ``raw`` from ``start``."""
    n = total.size
    if code == 0:
        return U32(_times(halves(raw, start, n), factor, total)) << U32(16)
    if code == 2:
        return _times(_words(raw, start, n), factor, total)
    top = decode(code, raw, start, total)
    for i in range(n):
        total[i] *= factor
    return top


@njit
def plus(code, raw, start, factor, total, spare):
    """total += factor * the elements of ``raw`` from ``start``. ``spare`` (n)."""
    n = total.size
    if code == 0:
        return U32(_plus(halves(raw, start, n), factor, total)) << U32(16)
    if code == 2:
        return _plus(_words(raw, start, n), factor, total)
    top = decode(code, raw, start, spare)
    for i in range(n):
        total[i] += factor * spare[i]
    return top


@njit
def minus(code, raw, start, base, delta):
    """delta = the elements of ``raw`` from ``start`` - base."""
    n = delta.size
    if code == 0:
        return U32(_minus(halves(raw, start, n), base, delta)) << U32(16)
    if code == 2:
        return _minus(_words(raw, start, n), base, delta)
    top = decode(code, raw, start, delta)
    for i in range(n):
        delta[i] -= base[i]
    return top


@njit
def add_kept(code, raw, start, base, low, high, factor, weight, delta, total):
    """delta = (the elements of ``raw`` from ``start`` - base) * factor * weight, 0 where the difference's
    magnitude has bits below ``low`` or not below ``high``; total += delta."""
    n = total.size
    if code == 0:
        stored = halves(raw, start, n)
        return U32(_add_kept(stored, base, low, high, factor, weight, delta, total)) << U32(16)
    if code == 2:
        return _add_kept(_words(raw, start, n), base, low, high, factor, weight, delta, total)
    top = decode(code, raw, start, delta)
    _add_kept(delta.view(np.uint32), base, low, high, factor, weight, delta, total)
    return top
