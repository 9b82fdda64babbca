"""The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfast import reference

from . import squares
from .codec import encode, load, pointer
from .formulas import RULES, Rule
from .table import (
    COLUMNS,
    DTYPES,
    FIRST,
    GRAD,
    GROUP,
    INDEX,
    MASTER,
    MOMENT,
    NUMEL,
    PARAM,
    STEP,
    STEP_BLOCK,
    Table,
    launch,
    values,
)

BLOCK = tl.constexpr(STEP_BLOCK)
RESET, WRITTEN = tl.constexpr(reference.RESET), tl.constexpr(reference.WRITTEN)
CONSTANTS = tl.constexpr(8)  # a row of constants: the gradient's multiplier, and what a rule's prepare returns
if max(rule.constants for rule in RULES.values()) >= CONSTANTS.value:
    raise RuntimeError("deepfast: a rule prepares more constants than a row holds")
WARPS = 4


@triton.jit
def prepare_kernel(
    rows,  # int64 [spans, COLUMNS]
    groups,  # int64 [groups, HYPER + 2]: the bits of the fp64 hyperparameters, address and size of a tensor lr
    record,  # fp32 [3]
    norms,  # fp64 [spans, 2], or None
    constants,  # fp32 [spans, CONSTANTS], filled
    PREPARE: tl.constexpr,
    HYPER: tl.constexpr,
    COUNT: tl.constexpr,
    COUNTS_STEPS: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """What an update takes of a span beside its elements, one program a span. Moves the step counts on."""
    span = tl.program_id(0)
    row = rows + span * COLUMNS
    group = groups + tl.load(row + GROUP) * (HYPER + 2)
    sign = tl.load(group).to(tl.float64, bitcast=True)
    lr = tl.load(group + 1).to(tl.float64, bitcast=True)
    lr_at = tl.load(group + HYPER)
    lr_size = tl.load(group + HYPER + 1)
    if lr_size == 4:
        lr = tl.load(lr_at.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif lr_size == 8:
        lr = tl.load(lr_at.to(tl.pointer_type(tl.float64)))
    hyper = (lr,)
    for k in tl.static_range(2, HYPER):
        hyper = hyper + (tl.load(group + k).to(tl.float64, bitcast=True),)

    t = tl.full([], 0, tl.int64)
    if COUNTS_STEPS:
        steps_at = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        steps = tl.load(steps_at)
        t = (steps + 1.0).to(tl.int64)
        if ADVANCE:
            tl.store(steps_at, steps + 1.0, mask=not tl.load(record + 1) > 0)

    out = constants + span * CONSTANTS
    tl.store(out, tl.load(record) * sign.to(tl.float32))
    found = PREPARE(hyper, t, None if norms is None else norms + 2 * tl.load(row + INDEX))
    for k in tl.static_range(COUNT):
        tl.store(out + 1 + k, found[k].to(tl.float32))


@triton.jit
def moment_pointers(row, i, MOMENTS: tl.constexpr, PACK: tl.constexpr):
    at = ()
    for k in tl.static_range(MOMENTS):
        at = at + (pointer(tl.load(row + MOMENT + k), tl.float32, PACK) + i,)
    return at


@triton.jit
def load_each(at, mask, MOMENTS: tl.constexpr):
    out = ()
    for k in tl.static_range(MOMENTS):
        out = out + (load(at[k], mask, tl.float32),)
    return out


@triton.jit
def update(
    row, constants, record, i, mask,
    UPDATE: tl.constexpr, MOMENTS: tl.constexpr, COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr, HAS_MASTER: tl.constexpr, GRAD_TYPE: tl.constexpr, PACK: tl.constexpr,
    AFTER: tl.constexpr, sinks, SINKS: tl.constexpr,
):  # fmt: skip
    """The elements i of a span, where mask says so (None: all)."""
    grad_at = pointer(tl.load(row + GRAD), GRAD_TYPE, PACK) + i
    if not tl.load(record + 1) > 0:
        param_at = pointer(tl.load(row + PARAM), PARAM_TYPE, PACK) + i
        master_at = pointer(tl.load(row + MASTER), tl.float32, PACK) + i
        moments_at = moment_pointers(row, i, MOMENTS, PACK)
        p = load(master_at, mask, tl.float32) if HAS_MASTER else load(param_at, mask, PARAM_TYPE)
        scaled = load(grad_at, mask, GRAD_TYPE)
        g = scaled * tl.load(constants)
        moments = load_each(moments_at, mask, MOMENTS)
        new = UPDATE(values(constants + 1, COUNT), p, g, *moments)
        if HAS_MASTER:
            tl.store(master_at, new[0], mask)
        weight = encode(new[0], PARAM_TYPE, HAS_MASTER)
        tl.store(param_at, weight, mask)
        for k in tl.static_range(SINKS):
            there = tl.load(row + PARAM) + tl.load(sinks + k)
            tl.store(pointer(there, PARAM_TYPE, PACK) + i, weight, mask)
        for k in tl.static_range(MOMENTS):
            tl.store(moments_at[k], new[1 + k], mask)
        if AFTER == WRITTEN:
            tl.store(grad_at, encode(scaled * tl.load(record), GRAD_TYPE, False), mask)
    if AFTER == RESET:
        tl.store(grad_at, 0, mask)


@triton.jit(do_not_specialize=["first"])
def step_kernel(
    rows,  # int64 [spans, COLUMNS]
    owners,  # int32 [blocks]
    first,  # the launch's first block
    constants,  # fp32 [spans, CONSTANTS]
    record,  # fp32 [3]
    UPDATE: tl.constexpr,
    MOMENTS: tl.constexpr,
    COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    PACK: tl.constexpr,
    AFTER: tl.constexpr,
    sinks,  # int64 [SINKS]: how many bytes after this rank's weights others have theirs; or None
    SINKS: tl.constexpr,
):
    """One program a block of BLOCK elements. Only a span's last block is masked: all others move 16 bytes at once."""
    block = first + tl.program_id(0)
    span = tl.load(owners + block)
    row = rows + span * COLUMNS
    begin = (block - tl.load(row + FIRST)) * BLOCK
    numel = tl.load(row + NUMEL)
    i = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= numel:
        update(row, constants + span * CONSTANTS, record, i, None, UPDATE, MOMENTS, COUNT, PARAM_TYPE, HAS_MASTER,
               GRAD_TYPE, PACK, AFTER, sinks, SINKS)  # fmt: skip
    else:
        update(row, constants + span * CONSTANTS, record, i, i < numel, UPDATE, MOMENTS, COUNT, PARAM_TYPE,
               HAS_MASTER, GRAD_TYPE, PACK, AFTER, sinks, SINKS)  # fmt: skip


@triton.jit
def measure(
    row, constants, begin, numel, live, partial, directions, block,
    DIRECT: tl.constexpr, DIRECTION: tl.constexpr, MOMENTS: tl.constexpr, COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr, HAS_MASTER: tl.constexpr, GRAD_TYPE: tl.constexpr, PACK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """TILE blocks, row after row: their moments are moved on, and what is in registers is measured."""
    if HAS_MASTER:
        weights = pointer(tl.load(row + MASTER), tl.float32, PACK)
    else:
        weights = pointer(tl.load(row + PARAM), PARAM_TYPE, PACK)
    grads = pointer(tl.load(row + GRAD), GRAD_TYPE, PACK)
    moments_at = moment_pointers(row, begin, MOMENTS, PACK)
    WEIGHT_TYPE: tl.constexpr = tl.float32 if HAS_MASTER else PARAM_TYPE
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
        p = load((weights + begin)[:, None] + i, mask, WEIGHT_TYPE)
        g = load((grads + begin)[:, None] + i, mask, GRAD_TYPE) * multiplier
        at = ()
        for k in tl.static_range(MOMENTS):
            at = at + (moments_at[k][:, None] + i,)
        new = DIRECT(c, p, g, *load_each(at, mask, MOMENTS))
        for k in tl.static_range(MOMENTS):
            tl.store(at[k], new[1 + k], mask)
        direction = tl.where(mask, new[0], 0.0) if MASKED else new[0]
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
            p = load((weights + begin)[:, None] + i, mask, WEIGHT_TYPE)
            at = ()
            for k in tl.static_range(MOMENTS):
                at = at + (moments_at[k][:, None] + i,)
            direction = DIRECTION(c, p, *load_each(at, mask, MOMENTS))
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
    DIRECT: tl.constexpr,
    DIRECTION: tl.constexpr,
    MOMENTS: tl.constexpr,
    COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
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
            measure(row, at, begin, numel, live, partial, directions, block, DIRECT, DIRECTION, MOMENTS, COUNT,
                    PARAM_TYPE, HAS_MASTER, GRAD_TYPE, PACK, False)  # fmt: skip
        else:
            measure(row, at, begin, numel, live, partial, directions, block, DIRECT, DIRECTION, MOMENTS, COUNT,
                    PARAM_TYPE, HAS_MASTER, GRAD_TYPE, PACK, True)  # fmt: skip


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


def prepare(rule: Rule, table: Table, groups: Tensor, record: Tensor, norms: Tensor | None, *, advance: bool) -> Tensor:
    """fp32 [spans, CONSTANTS]; with ``advance`` the step counts are moved on."""
    constants = torch.empty((len(table), CONSTANTS.value), dtype=torch.float32, device=table.device)
    launch(prepare_kernel, len(table), table.device, table.rows, groups, record, norms, constants,
           rule.prepare, rule.hyper, rule.constants, rule.counts_steps, advance, num_warps=1)  # fmt: skip
    return constants


def step(rule: Rule, table: Table, groups: Tensor, record: Tensor, norms: Tensor | None, after: int,
         sinks: Tensor | None = None) -> None:  # fmt: skip
    """One step over all spans of ``table``; see :meth:`deepfast.reference.Plan.step`.

    Args:
        groups: int64 [groups, hyper + 2] on the device, see ``prepare_kernel``.
        record: fp32 [3] on the device.
        norms: fp64 [spans, 2] on the device, where the rule needs norms.
        after: what becomes of the gradients.
        sinks: int64 on the device, or None; see :meth:`deepfast.kernels.plan.Plan.send_to`.
    """
    count = 0 if sinks is None else len(sinks)
    constants = prepare(rule, table, groups, record, norms, advance=True)
    for kind, first, blocks, _, _ in table.launches:
        launch(step_kernel, blocks, table.device, table.rows, table.owners, first, constants, record,
               rule.update, rule.moments, rule.constants, DTYPES[kind.param], kind.master, DTYPES[kind.grad],
               kind.pack, int(after), sinks, count, num_warps=WARPS)  # fmt: skip


def norms(rule: Rule, table: Table, groups: Tensor, record: Tensor) -> Tensor:
    """fp64 [spans, 2]: sums of squares of parameters and directions. Moves the moments on."""
    constants = prepare(rule, table, groups, record, None, advance=False)
    # Both halves begin on a boundary of 16 bytes: else the kernels would be compiled once more.
    partial = torch.empty((2, table.blocks + table.blocks % 2), dtype=torch.float64, device=table.device)
    for kind, first, blocks, _, _ in table.launches:
        programs = -(-blocks // squares.TILE.value)
        launch(norms_kernel, programs, table.device, table.rows, table.owners, first, first + blocks, constants,
               record, partial[0], partial[1], rule.direct, rule.direction, rule.moments, rule.constants,
               DTYPES[kind.param], kind.master, DTYPES[kind.grad], kind.pack, num_warps=WARPS)  # fmt: skip
    out = torch.empty((len(table), 2), dtype=torch.float64, device=table.device)
    launch(fold_norms_kernel, len(table), table.device, table.rows, partial[0], partial[1], record, out,
           num_warps=8)  # fmt: skip
    return out
