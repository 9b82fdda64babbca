"""Sums of squares, in the order of ``csrc/math/squares.h``: the same bits as on a CPU.

Element i of a block goes to lane i % 64, in fp32 and one after the other; a block's lanes are added pairwise in fp64,
and the blocks' sums are dealt out to 256 lanes likewise. A program takes TILE blocks at once, row after row of 64
elements, so that its threads hold neighbouring lanes and read 16 bytes each.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(64)
FOLD_LANES = tl.constexpr(256)
TILE = tl.constexpr(8)  # blocks: 512 lanes, four to each of 128 threads


@triton.jit
def add(sums, largest, x):
    """x: a row, [TILE, LANES]. largest: the largest magnitudes seen, as bits."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.fma(x, x, sums), tl.maximum(largest, magnitude)


@triton.jit
def needs_fp64(largest):
    """[TILE, LANES] -> [TILE]: whether a block's fp32 lanes have overflowed or lost small values."""
    bits = tl.max(largest, 1)
    bound = bits.to(tl.float32, bitcast=True)
    return (bits != 0) & (bits < 0x7F800000) & ((bound > 2.0**55) | (bound < 2.0**-55))


@triton.jit
def pairwise(lanes, ROWS: tl.constexpr, LOG2: tl.constexpr):
    """[ROWS, 2^LOG2] -> [ROWS]: lane + (lane of the other half), until there is one."""
    for level in tl.static_range(LOG2):
        lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 1 << (LOG2 - 1 - level)]), 1)
    return tl.reshape(lanes, [ROWS])


@triton.jit
def fold(partial, count):
    """The sum over fp64 partial[count], and how many of them are not finite; [1] each."""
    lanes = tl.arange(0, FOLD_LANES)
    total = tl.zeros([FOLD_LANES], tl.float64)
    non_finite = tl.zeros([FOLD_LANES], tl.float64)
    for begin in range(0, count, FOLD_LANES):
        block = tl.load(partial + begin + lanes, mask=begin + lanes < count, other=0.0)
        total += block
        non_finite += tl.where(block - block == 0, 0.0, 1.0)
    return pairwise(total, 1, 8), pairwise(non_finite, 1, 8)
