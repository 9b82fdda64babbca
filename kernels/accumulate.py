"""Micro-batches summed in fp32, also where their gradients are 16 bits wide."""

from __future__ import annotations

import triton
import triton.language as tl

from .codec import load, pointer
from .table import COLUMNS, DTYPES, FIRST, GRAD, NUMEL, PARAM, STEP_BLOCK, Table, launch

BLOCK = tl.constexpr(STEP_BLOCK)


@triton.jit
def add(sum_at, grad_at, weight, mask, GRAD_TYPE: tl.constexpr, OVERWRITE: tl.constexpr):
    g = load(grad_at, mask, GRAD_TYPE)
    tl.store(sum_at, weight * g if OVERWRITE else tl.fma(weight, g, load(sum_at, mask, tl.float32)), mask)


@triton.jit(do_not_specialize=["first"])
def accumulate_kernel(
    rows,  # int64 [spans, COLUMNS], the sum in the parameter's place
    owners,  # int32 [blocks]
    first,  # the launch's first block
    weight,
    GRAD_TYPE: tl.constexpr,
    PACK: tl.constexpr,
    OVERWRITE: tl.constexpr,
):
    """One program a block of BLOCK elements; only a span's last one is masked."""
    block = first + tl.program_id(0)
    row = rows + tl.load(owners + block) * COLUMNS
    begin = (block - tl.load(row + FIRST)) * BLOCK
    numel = tl.load(row + NUMEL)
    i = begin + tl.arange(0, BLOCK)
    sum_at = pointer(tl.load(row + PARAM), tl.float32, PACK) + i
    grad_at = pointer(tl.load(row + GRAD), GRAD_TYPE, PACK) + i
    if begin + BLOCK <= numel:
        add(sum_at, grad_at, weight, None, GRAD_TYPE, OVERWRITE)
    else:
        add(sum_at, grad_at, weight, i < numel, GRAD_TYPE, OVERWRITE)


def accumulate(table: Table, weight: float, overwrite: bool) -> None:
    for kind, first, blocks, _, _ in table.launches:
        launch(accumulate_kernel, blocks, table.device, table.rows, table.owners, first, float(weight),
               DTYPES[kind.grad], kind.pack, overwrite, num_warps=4)  # fmt: skip
