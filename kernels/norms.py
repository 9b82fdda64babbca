"""The first pass of a rule that needs norms of whole parameters: moves the moments on, and measures."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import int8, squares
from .codec import load, pointer
from .formulas import Rule
from .step import BLOCK, CONSTANTS, WARPS, prepare
from .streams import (
    decode_moments,
    encode_moments,
    is_grouped,
    load_moments,
    load_weight,
    moment_keys,
    moment_pointers,
    store_moments,
    weight_pointers,
)
from .table import COLUMNS, FIRST, GRAD, INDEX, NUMEL, PLACE, Table, launch

if squares.LANES.value != int8.GROUP.value:
    raise RuntimeError("deepfast: a row is a group of a moment in 8 bits")


@triton.jit
def moved_on(at, i, row, MOMENT_TYPES: tl.constexpr):
    """Pointers to blocks, as pointers to the elements i of each, which are its ``row``."""
    out = ()
    for k in tl.static_range(len(at)):
        if is_grouped(MOMENT_TYPES[k]):
            codes, words = at[k]
            out = out + ((codes[:, None] + i, (words + row)[:, None]),)
        else:
            out = out + (at[k][:, None] + i,)
    return out


@triton.jit
def measure(
    row, constants, begin, numel, live, partial, directions, block,
    MOVE: tl.constexpr, DIRECTION: tl.constexpr, COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, MOMENT_TYPES: tl.constexpr,
    PACK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """TILE blocks, row after row: their moments are moved on, and what is in registers is measured.

    The direction is that of the moments as they are stored: what is measured is what the second pass will take.
    """
    params, masters = weight_pointers(row, PARAM_TYPE, MASTER_TYPE, PACK)
    params, masters = (params + begin)[:, None], (masters + begin)[:, None]
    grads = pointer(tl.load(row + GRAD), GRAD_TYPE, PACK)
    moments_at = moment_pointers(row, begin, begin // int8.GROUP, MOMENT_TYPES, PACK)
    keys, place = moment_keys(row[:, None], 1, MOMENT_TYPES), tl.load(row + PLACE) + begin
    multiplier = tl.load(constants)[:, None]
    c = ()
    for k in tl.static_range(COUNT):
        c = c + (tl.load(constants + 1 + k)[:, None],)
    lanes = tl.arange(0, squares.LANES)[None, :]
    sums = tl.zeros([squares.TILE, squares.LANES], tl.float32)
    largest = tl.zeros([squares.TILE, squares.LANES], tl.int32)
    direction_sums, direction_largest = sums, largest
    for first in range(0, BLOCK, squares.LANES):
        i = first + lanes
        mask = begin[:, None] + i < numel[:, None] if MASKED else None
        p = load_weight(params + i, masters + i, mask, PARAM_TYPE, MASTER_TYPE)
        g = load((grads + begin)[:, None] + i, mask, GRAD_TYPE) * multiplier
        at = moved_on(moments_at, i, first // squares.LANES, MOMENT_TYPES)
        moved = MOVE(c, p, g, *load_moments(at, mask, MOMENT_TYPES))
        stored = encode_moments(moved, keys, place[:, None] + i, mask, MOMENT_TYPES)
        store_moments(at, stored, mask, MOMENT_TYPES)
        direction = DIRECTION(c, p, *decode_moments(stored, p.shape, MOMENT_TYPES))
        if MASKED:
            direction = tl.where(mask, direction, 0.0)
        sums, largest = squares.add(sums, largest, p)
        direction_sums, direction_largest = squares.add(direction_sums, direction_largest, direction)

    wide_param, wide_direction = squares.needs_fp64(largest), squares.needs_fp64(direction_largest)
    totals, direction_totals = sums.to(tl.float64), direction_sums.to(tl.float64)
    if tl.max((wide_param | wide_direction).to(tl.int32), 0) > 0:
        tl.debug_barrier()  # the moments that other threads have written
        again = tl.zeros([squares.TILE, squares.LANES], tl.float64)
        direction_again = again
        for first in range(0, BLOCK, squares.LANES):
            i = first + lanes
            mask = begin[:, None] + i < numel[:, None] if MASKED else None
            p = load_weight(params + i, masters + i, mask, PARAM_TYPE, MASTER_TYPE)
            at = moved_on(moments_at, i, first // squares.LANES, MOMENT_TYPES)
            direction = DIRECTION(c, p, *load_moments(at, mask, MOMENT_TYPES))
            if MASKED:
                direction = tl.where(mask, direction, 0.0)
            again += p.to(tl.float64) * p.to(tl.float64)
            direction_again += direction.to(tl.float64) * direction.to(tl.float64)
        totals = tl.where(wide_param[:, None], again, totals)
        direction_totals = tl.where(wide_direction[:, None], direction_again, direction_totals)
    tl.store(partial + block, squares.pairwise(totals, squares.TILE, 6), live)
    tl.store(directions + block, squares.pairwise(direction_totals, squares.TILE, 6), live)


@triton.jit(do_not_specialize=["first", "end"])
def norms_kernel(
    rows,  # int64 [spans, COLUMNS]
    owners,  # int32 [blocks]
    first,  # the launch's first block
    end,  # and the one after its last
    constants,  # fp32 [spans, CONSTANTS]
    record,  # fp32 [3]
    partial,  # fp64 [blocks], filled: sums of squares of parameters
    directions,  # and of directions
    MOVE: tl.constexpr,
    DIRECTION: tl.constexpr,
    COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    MASTER_TYPE: tl.constexpr,  # None, fp32 or int16 (split)
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPES: tl.constexpr,
    PACK: tl.constexpr,
):
    """The first pass of a rule that needs norms, one program TILE blocks of BLOCK elements."""
    block = first + tl.program_id(0) * squares.TILE + tl.arange(0, squares.TILE)
    live = block < end
    span = tl.load(owners + block, mask=live, other=0)
    row = rows + span * COLUMNS
    begin = (block - tl.load(row + FIRST)) * BLOCK
    numel = tl.where(live, tl.load(row + NUMEL), 0)
    begin = tl.multiple_of(tl.where(live, begin, 0), BLOCK)
    at = constants + span * CONSTANTS
    if not tl.load(record + 1) > 0:
        if tl.min(numel - begin, 0) >= BLOCK:
            measure(row, at, begin, numel, live, partial, directions, block, MOVE, DIRECTION, COUNT, PARAM_TYPE,
                    MASTER_TYPE, GRAD_TYPE, MOMENT_TYPES, PACK, False)  # fmt: skip
        else:
            measure(row, at, begin, numel, live, partial, directions, block, MOVE, DIRECTION, COUNT, PARAM_TYPE,
                    MASTER_TYPE, GRAD_TYPE, MOMENT_TYPES, PACK, True)  # fmt: skip


@triton.jit
def fold_norms_kernel(
    rows,  # int64 [spans, COLUMNS]
    partial,  # fp64 [blocks]
    directions,  # fp64 [blocks]
    record,  # fp32 [3]
    out,  # fp64 [spans, 2], filled
):
    """One program a span; zero where the step is skipped."""
    row = rows + tl.program_id(0) * COLUMNS
    first = tl.load(row + FIRST)
    blocks = tl.cdiv(tl.load(row + NUMEL), BLOCK)
    if tl.load(record + 1) > 0:
        blocks = blocks * 0
    param, _ = squares.fold(partial + first, blocks)
    direction, _ = squares.fold(directions + first, blocks)
    at = out + 2 * tl.load(row + INDEX) + tl.arange(0, 1)
    tl.store(at, param)
    tl.store(at + 1, direction)


def norms(rule: Rule, table: Table, groups: Tensor, record: Tensor) -> Tensor:
    """fp64 [spans, 2]: sums of squares of parameters and directions. Moves the moments on."""
    constants = prepare(rule, table, groups, record, None, advance=False)
    # Both halves begin on a boundary of 16 bytes: else the kernels would be compiled once more.
    partial = torch.empty((2, table.blocks + table.blocks % 2), dtype=torch.float64, device=table.device)
    for kind, first, blocks, _, _ in table.launches:
        programs = -(-blocks // squares.TILE.value)
        launch(norms_kernel, programs, table.device, table.rows, table.owners, first, first + blocks, constants,
               record, partial[0], partial[1], rule.move, rule.direction, rule.constants,
               *kind.streams(), num_warps=WARPS)  # fmt: skip
    out = torch.empty((len(table), 2), dtype=torch.float64, device=table.device)
    launch(fold_norms_kernel, len(table), table.device, table.rows, partial[0], partial[1], record, out,
           num_warps=8)  # fmt: skip
    return out
