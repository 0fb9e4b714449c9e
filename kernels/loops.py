"""The compiled loops by name. What they do is said where they are defined, in ``mixmerge.kernels.compiled``."""

from __future__ import annotations

from mixmerge.kernels.native import Loop

# Inputs of a chunk: stored bytes (E, bytes), their dtypes (E), which are deltas already (E), n.
_CHUNK = "u1[:,:] i8[:] u1[:] i8"

decode = Loop("cast.decode", "i8 u1[:] i8 f4[:] -> u4")
encode = Loop("cast.encode", "i8 f4[:] u1[:] i8 -> u4")
deltas = Loop("combine.deltas_chunk", "u1[:,:] i8[:] u1[:] i8 i8 f4[:] f4[:]")

linear_chunk = Loop("combine.linear_chunk", "u1[:,:] i8[:] i8 f4[:] u1[:] i8 f4[:,:] u4[:]")
combine_chunk = Loop(
    "combine.combine_chunk",
    f"{_CHUNK} i8 f4[:] f4[:] i8[:] i8[:,:] u1[:,:] i8 i8 f4 f4 u1[:] i8 f4[:,:] u4[:]",
)
magnitudes_chunk = Loop("combine.magnitudes_chunk", f"{_CHUNK} i8 i8 i8 i8[:] u1[:] f4[:,:] f8[:,:] f8[:]")
products_chunk = Loop("combine.products_chunk", "u1[:,:] i8[:] i8 f4[:,:] f8[:,:] f8[:]")

collect_chunk = Loop(
    "select.collect_chunk",
    f"{_CHUNK} i8[:] u4[:] u4[:] u4[:,:] i8[:] i8[:] i8[:,:] i8[:] i8 u4[:,:] u4[:,:] f4[:,:] u1[:]",
)
histogram_chunk = Loop("select.histogram_chunk", f"{_CHUNK} i8 i8 i8[:] f4[:,:]")
ties_chunk = Loop("select.ties_chunk", f"{_CHUNK} i8 i8 i8 f4[:,:] i8[:]")

draw_block = Loop("random.draw_block", "u4[:] i8 u4[:] u4[:]")
mask_chunk = Loop(
    "masks.mask_chunk",
    f"{_CHUNK} i8 i8 i8 u4[:] f8 f8 u1[:] f4[:] u4[:] u1[:] f4[:] u4[:] u4[:] f8[:,:] f8[:]",
)
inverse_chunk = Loop(
    "masks.inverse_chunk", f"{_CHUNK} i8 i8 i8 u4[:] f8 f8 u4[:] u1[:] f4[:] u4[:] u4[:] f4[:]"
)

compare_chunk = Loop("compare.compare_chunk", f"{_CHUNK} f4[:,:] u1[:,:] f8[:,:] f8[:,:] i8[:,:] f8[:] u4[:]")

gradient_products = Loop(
    "mixing.gradient_products", "i8[:] i8[:] u1[:,:] i8 i8 u1[:] i8 f4[:,:] f4[:] f8[:,:] f8[:]"
)
mixed_chunk = Loop("mixing.mixed_chunk", "i8[:] i8[:] u1[:,:] i8 i8 f4[:] u1[:] i8 f4[:,:]")

product = Loop("lowrank.product", "f4[:,:] f4[:,:] f4[:,:] f4[:,:]")
row_norms = Loop("lowrank.row_norms", "f4[:,:] f8[:] f8[:]")

keep_largest = Loop("nearest.keep_largest", "f4[:,:] i8 i8[:] i8[:,:] i8[:] i8[:] i8")
screen_largest = Loop(
    "nearest.screen_largest",
    "f4[:,:] f4[:] i8 i8[:] f4[:] f4[:,:] f4[:,:] i8[:,:] i8[:] i8[:] i8",
)
weighted_sums = Loop("nearest.weighted_sums", "i8[:,:] f4[:,:] f4[:,:] f4[:,:]")

add_pairs = Loop("factors.add_pairs", "i8 i8 i8")
