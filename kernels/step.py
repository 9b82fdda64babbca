"""The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfast import reference

from . import int8
from .codec import encode, load, pointer
from .formulas import RULES, Rule
from .streams import (
    encode_moments,
    load_moments,
    load_weight,
    moment_keys,
    moment_pointers,
    rounded_by_chance,
    store_master,
    store_moments,
    weight_pointers,
)
from .table import COLUMNS, FIRST, GRAD, GROUP, INDEX, NUMEL, PARAM, PLACE, STEP, STEP_BLOCK, Table, launch, values

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
    ADVANCE: tl.constexpr,
):
    """What an update takes of a span beside its elements, one program a span. Moves the step counts on.

    Rules that do not count have some, too, where chance is asked for: their prepare takes no heed of t.
    """
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
    address = tl.load(row + STEP)
    if address != 0:
        steps_at = address.to(tl.pointer_type(tl.float32))
        steps = tl.load(steps_at) + 1.0
        t = steps.to(tl.int64)
        if ADVANCE:
            tl.store(steps_at, steps, mask=not tl.load(record + 1) > 0)

    out = constants + span * CONSTANTS
    tl.store(out, tl.load(record) * sign.to(tl.float32))
    found = PREPARE(hyper, t, None if norms is None else norms + 2 * tl.load(row + INDEX))
    for k in tl.static_range(COUNT):
        tl.store(out + 1 + k, found[k].to(tl.float32))


@triton.jit
def update(
    row, constants, record, begin, i, mask,
    UPDATE: tl.constexpr, COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, MOMENT_TYPES: tl.constexpr,
    PACK: tl.constexpr, CHANCE: tl.constexpr, AFTER: tl.constexpr, sinks, SINKS: tl.constexpr,
):  # fmt: skip
    """The elements i of a span, BLOCK from ``begin`` on, where mask says so (None: all)."""
    grad_at = pointer(tl.load(row + GRAD), GRAD_TYPE, PACK) + i
    if not tl.load(record + 1) > 0:
        param, master = weight_pointers(row, PARAM_TYPE, MASTER_TYPE, PACK)
        group = begin // int8.GROUP + tl.arange(0, BLOCK // int8.GROUP)[:, None]
        moments_at = moment_pointers(row, i, group, MOMENT_TYPES, PACK)
        p = load_weight(param + i, master + i, mask, PARAM_TYPE, MASTER_TYPE)
        scaled = load(grad_at, mask, GRAD_TYPE)
        g = scaled * tl.load(constants)
        new = UPDATE(values(constants + 1, COUNT), p, g, *load_moments(moments_at, mask, MOMENT_TYPES))
        if CHANCE:
            weight = rounded_by_chance(row, new[0], i, PARAM_TYPE)
        else:
            weight = encode(new[0], PARAM_TYPE, MASTER_TYPE is not None)
        if MASTER_TYPE is not None:
            store_master(master + i, new[0], weight, mask, PARAM_TYPE, MASTER_TYPE)
        tl.store(param + i, weight, mask)
        for k in tl.static_range(SINKS):
            there = tl.load(row + PARAM) + tl.load(sinks + k)
            tl.store(pointer(there, PARAM_TYPE, PACK) + i, weight, mask)
        keys = moment_keys(row, 0, MOMENT_TYPES)
        stored = encode_moments(new[1:], keys, tl.load(row + PLACE) + i, mask, MOMENT_TYPES)
        store_moments(moments_at, stored, mask, MOMENT_TYPES)
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
    COUNT: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    MASTER_TYPE: tl.constexpr,  # None, fp32 or int16 (split)
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPES: tl.constexpr,
    PACK: tl.constexpr,
    CHANCE: tl.constexpr,
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
        update(row, constants + span * CONSTANTS, record, begin, i, None, UPDATE, COUNT, PARAM_TYPE, MASTER_TYPE,
               GRAD_TYPE, MOMENT_TYPES, PACK, CHANCE, AFTER, sinks, SINKS)  # fmt: skip
    else:
        update(row, constants + span * CONSTANTS, record, begin, i, i < numel, UPDATE, COUNT, PARAM_TYPE, MASTER_TYPE,
               GRAD_TYPE, MOMENT_TYPES, PACK, CHANCE, AFTER, sinks, SINKS)  # fmt: skip


def prepare(rule: Rule, table: Table, groups: Tensor, record: Tensor, norms: Tensor | None, *, advance: bool) -> Tensor:
    """fp32 [spans, CONSTANTS]; with ``advance`` the step counts are moved on."""
    constants = torch.empty((len(table), CONSTANTS.value), dtype=torch.float32, device=table.device)
    launch(prepare_kernel, len(table), table.device, table.rows, groups, record, norms, constants,
           rule.prepare, rule.hyper, rule.constants, advance, num_warps=1)  # fmt: skip
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
               rule.update, rule.constants, *kind.streams(), kind.chance, int(after), sinks, count,
               num_warps=WARPS)  # fmt: skip
