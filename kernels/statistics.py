"""One read of the gradients: the sum of their squares, whether all are finite, and what follows for the step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import squares
from .codec import load, pointer
from .formulas import decided
from .table import COLUMNS, DTYPES, GRAD, NUMEL, READ_BLOCK, READ_FIRST, READ_INDEX, Table, launch

BLOCK = tl.constexpr(READ_BLOCK)
UNROLL = tl.constexpr(8)  # rows under way at once


@triton.jit
def sum_blocks(
    grads, begin, numel, GRAD_TYPE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """[TILE]: the sums of squares of TILE blocks."""
    lanes = tl.arange(0, squares.LANES)[None, :]
    sums = tl.zeros([squares.TILE, squares.LANES], tl.float32)
    largest = tl.zeros([squares.TILE, squares.LANES], tl.int32)
    for first in range(0, BLOCK, UNROLL * squares.LANES):
        for row in tl.static_range(UNROLL):
            i = first + row * squares.LANES + lanes
            mask = begin[:, None] + i < numel[:, None] if MASKED else None
            sums, largest = squares.add(sums, largest, load((grads + begin)[:, None] + i, mask, GRAD_TYPE))
    totals = sums.to(tl.float64)
    wide = squares.needs_fp64(largest)
    if tl.max(wide.to(tl.int32), 0) > 0:
        again = tl.zeros([squares.TILE, squares.LANES], tl.float64)
        for first in range(0, BLOCK, squares.LANES):
            i = first + lanes
            mask = begin[:, None] + i < numel[:, None] if MASKED else None
            x = load((grads + begin)[:, None] + i, mask, GRAD_TYPE).to(tl.float64)
            again += x * x
        totals = tl.where(wide[:, None], again, totals)
    return squares.pairwise(totals, squares.TILE, 6)


@triton.jit(do_not_specialize=["first", "end"])
def squares_kernel(
    rows,  # int64 [spans, COLUMNS]
    owners,  # int32 [blocks]
    first,  # the launch's first block
    end,  # and the one after its last
    partial,  # fp64 [blocks], filled; not finite where an element is not
    GRAD_TYPE: tl.constexpr,
    PACK: tl.constexpr,
):
    """One program TILE blocks of BLOCK elements."""
    block = first + tl.program_id(0) * squares.TILE + tl.arange(0, squares.TILE)
    live = block < end
    row = rows + tl.load(owners + block, mask=live, other=0) * COLUMNS
    within = tl.where(live, block - tl.load(row + READ_FIRST), 0)
    numel = tl.where(live, tl.load(row + NUMEL), 0)
    begin = tl.multiple_of(within * BLOCK, BLOCK)
    grads = pointer(tl.load(row + GRAD), GRAD_TYPE, PACK)
    out = partial + tl.load(row + READ_INDEX) + within
    if tl.min(numel - begin, 0) >= BLOCK:
        tl.store(out, sum_blocks(grads, begin, numel, GRAD_TYPE, False))
    else:
        tl.store(out, sum_blocks(grads, begin, numel, GRAD_TYPE, True), live)


@triton.jit
def write_record(record, sum_of_squares, non_finite, grad_scale, found_inf, max_norm, CHECK: tl.constexpr):
    one = tl.full([], 1.0, tl.float32)
    scale = one if grad_scale is None else tl.load(grad_scale)
    found = one * 0.0 if found_inf is None else tl.load(found_inf)
    multiplier, skip, norm = decided(sum_of_squares, non_finite, scale, found, one * max_norm, CHECK)
    at = tl.arange(0, 1)
    tl.store(record + at, multiplier)
    tl.store(record + 1 + at, skip)
    tl.store(record + 2 + at, norm)


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    partial,  # fp64 [count]
    count,
    out,  # fp64 [2], filled with the statistics; or None
    record,  # fp32 [3], filled with what follows from them; or None
    grad_scale,  # fp32 [1], or None
    found_inf,  # fp32 [1], or None
    max_norm,
    CHECK: tl.constexpr,
):
    """All in one program."""
    sum_of_squares, non_finite = squares.fold(partial, count)
    if out is not None:
        tl.store(out + tl.arange(0, 1), sum_of_squares)
        tl.store(out + 1 + tl.arange(0, 1), non_finite)
    if record is not None:
        write_record(record, sum_of_squares, non_finite, grad_scale, found_inf, max_norm, CHECK)


@triton.jit
def decide_kernel(record, statistics, grad_scale, found_inf, max_norm, CHECK: tl.constexpr):
    """statistics: fp64 [2], or None for zeros."""
    at = tl.arange(0, 1)
    sum_of_squares = tl.zeros([1], tl.float64)
    non_finite = sum_of_squares
    if statistics is not None:
        sum_of_squares, non_finite = tl.load(statistics + at), tl.load(statistics + 1 + at)
    write_record(record, sum_of_squares, non_finite, grad_scale, found_inf, max_norm, CHECK)


def _partial(table: Table) -> Tensor:
    """fp64 [blocks]: every block's sum of squares, in the gradients' order."""
    partial = torch.empty(table.read_blocks, dtype=torch.float64, device=table.device)
    for kind, _, _, first, blocks in table.launches:
        programs = -(-blocks // squares.TILE.value)
        launch(squares_kernel, programs, table.device, table.rows, table.read_owners, first, first + blocks, partial,
               DTYPES[kind.grad], kind.read, num_warps=4)  # fmt: skip
    return partial


def statistics(table: Table) -> Tensor:
    """fp64 [2]: sum of squares, and > 0 where some gradient is not finite."""
    out = torch.empty(2, dtype=torch.float64, device=table.device)
    launch(fold_kernel, 1, table.device, _partial(table), table.read_blocks, out, None, None, None, 0.0, False,
           num_warps=8)  # fmt: skip
    return out


def decide_from_gradients(
    record: Tensor, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None, max_norm: float, check: bool
) -> None:
    """The statistics, and the record that follows from them."""
    launch(fold_kernel, 1, table.device, _partial(table), table.read_blocks, None, record, grad_scale, found_inf,
           float(max_norm), check, num_warps=8)  # fmt: skip


def decide(
    record: Tensor,
    statistics: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float,
    check: bool,
) -> None:
    launch(decide_kernel, 1, record.device, record, statistics, grad_scale, found_inf, float(max_norm), check,
           num_warps=1)  # fmt: skip
