"""Masters that take over what somebody else has written to their 16-bit weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode, encode, fetch
from .step import WARPS
from .streams import load_weight, store_master, weight_pointers
from .table import COLUMNS, FIRST, NUMEL, STEP_BLOCK, Table, launch

BLOCK = tl.constexpr(STEP_BLOCK)


@triton.jit
def take_over(row, i, mask, PARAM_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr, PACK: tl.constexpr):
    """The elements i of a span, where mask says so (None: all)."""
    param, master = weight_pointers(row, PARAM_TYPE, MASTER_TYPE, PACK)
    weight = fetch(param + i, mask)
    value = load_weight(param + i, master + i, mask, PARAM_TYPE, MASTER_TYPE)
    now, then = decode(weight, PARAM_TYPE), decode(encode(value, PARAM_TYPE, True), PARAM_TYPE)
    store_master(master + i, tl.where(then == now, value, now), weight, mask, PARAM_TYPE, MASTER_TYPE)


@triton.jit(do_not_specialize=["first"])
def refresh_kernel(
    rows,  # int64 [spans, COLUMNS]
    owners,  # int32 [blocks]
    first,  # the launch's first block
    PARAM_TYPE: tl.constexpr,
    MASTER_TYPE: tl.constexpr,
    PACK: tl.constexpr,
):
    """One program a block of BLOCK elements. Only a span's last block is masked."""
    block = first + tl.program_id(0)
    row = rows + tl.load(owners + block) * COLUMNS
    begin = (block - tl.load(row + FIRST)) * BLOCK
    numel = tl.load(row + NUMEL)
    i = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= numel:
        take_over(row, i, None, PARAM_TYPE, MASTER_TYPE, PACK)
    else:
        take_over(row, i, i < numel, PARAM_TYPE, MASTER_TYPE, PACK)


def refresh(table: Table) -> None:
    """Where a master rounds to another weight, it becomes the weight. The rest knows more than 16 bits, and stays."""
    for kind, first, blocks, _, _ in table.launches:
        param, master, _, _, pack = kind.streams()
        launch(refresh_kernel, blocks, table.device, table.rows, table.owners, first, param, master, pack,
               num_warps=WARPS)  # fmt: skip
