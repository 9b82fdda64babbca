"""Sums of squares, in the order of ``csrc/math/squares.h``: the same bits as on a CPU.

Element i of a block goes to lane i % 64, in fp32 and one after the other; a block's lanes are added pairwise in fp64,
and so are the blocks' sums, a row of 256 at a time, and then the rows' sums. A program takes TILE blocks at once, row
after row of 64 elements, so that its threads hold neighbouring lanes and read 16 bytes each.
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
def fold_rows(partial, count):
    """The same as ``fold``, of at most 256 rows; 16 of them are under way at once."""
    in_tile = tl.arange(0, 16)[:, None] * FOLD_LANES + tl.arange(0, FOLD_LANES)[None, :]
    total = tl.zeros([16, 16], tl.float64)
    non_finite = tl.zeros([16, 16], tl.float64)
    for tile in range(0, tl.cdiv(count, 16 * FOLD_LANES)):
        i = tile * 16 * FOLD_LANES + in_tile
        block = tl.load(partial + i, mask=i < count, other=0.0)
        bad = tl.where(block - block == 0, 0.0, 1.0).to(tl.float64)
        here = tl.arange(0, 16)[:, None] == tile
        total = tl.where(here, pairwise(block, 16, 8)[None, :], total)
        non_finite = tl.where(here, pairwise(bad, 16, 8)[None, :], non_finite)
    return pairwise(tl.reshape(total, [1, FOLD_LANES]), 1, 8), pairwise(tl.reshape(non_finite, [1, FOLD_LANES]), 1, 8)


@triton.jit
def fold(partial, count):
    """The sum over fp64 partial[count], and how many of them are not finite; [1] each.

    Always three levels, for at most 2^24 blocks: zeros that are added change nothing.
    """
    lanes = tl.arange(0, FOLD_LANES)
    total = tl.zeros([FOLD_LANES], tl.float64)
    non_finite = tl.zeros([FOLD_LANES], tl.float64)
    for row in range(0, tl.cdiv(count, FOLD_LANES * FOLD_LANES)):
        begin = row * FOLD_LANES * FOLD_LANES
        sums, bad = fold_rows(partial + begin, min(count - begin, FOLD_LANES * FOLD_LANES))
        total = tl.where(lanes == row, sums, total)
        non_finite = tl.where(lanes == row, bad, non_finite)
    return pairwise(tl.reshape(total, [1, FOLD_LANES]), 1, 8), pairwise(tl.reshape(non_finite, [1, FOLD_LANES]), 1, 8)
