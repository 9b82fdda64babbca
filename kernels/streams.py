"""What a step reads and writes of a span, in the types that it is stored in: the twin of ``csrc/cpu/streams.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from . import int8
from .codec import (
    decode,
    decode_split,
    dither,
    dither_bits,
    encode,
    fetch,
    load,
    noise,
    noise_bits,
    pointer,
    remainder,
    stochastic,
)
from .table import MASTER, MOMENT, NUMEL, PARAM, PLACE, SEED, STEP


@triton.jit
def weight_pointers(row, PARAM_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr, PACK: tl.constexpr):
    """Parameter and master; where there is no master, twice the parameter."""
    param = pointer(tl.load(row + PARAM), PARAM_TYPE, PACK)
    if MASTER_TYPE is None:
        master = param
    else:
        master = pointer(tl.load(row + MASTER), MASTER_TYPE, PACK)
    return param, master


@triton.jit
def load_weight(param_at, master_at, mask, PARAM_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr):
    """fp32, as exactly as it is known."""
    if MASTER_TYPE is None:
        p = load(param_at, mask, PARAM_TYPE)
    elif MASTER_TYPE == tl.int16:
        p = decode_split(fetch(param_at, mask), fetch(master_at, mask), PARAM_TYPE)
    else:
        p = load(master_at, mask, MASTER_TYPE)
    return p


@triton.jit
def counted(row):
    """The steps, fp32."""
    return tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))


@triton.jit
def rounded_by_chance(row, p, i, PARAM_TYPE: tl.constexpr):
    """The elements i of a span's new weight. The step has been counted already."""
    steps = counted(row)
    key = noise(tl.load(row + SEED), steps)
    return stochastic(p, noise_bits(key, tl.load(row + PLACE) + i) >> 16, PARAM_TYPE)


@triton.jit
def store_master(at, p, weight, mask, PARAM_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr):
    """weight: ``p`` encoded, and stored elsewhere."""
    if MASTER_TYPE == tl.int16:
        tl.store(at, remainder(p, weight, PARAM_TYPE), mask)
    else:
        tl.store(at, p, mask)


@triton.jit
def is_grouped(TYPE: tl.constexpr):
    """Whether a moment is kept in 8 bits, in groups that have a word each (int8.py)."""
    return TYPE.primitive_bitwidth == 8


@triton.jit
def moment_pointers(row, i, group, MOMENT_TYPES: tl.constexpr, PACK: tl.constexpr):
    """To the elements i; of moments in groups to the codes, and to the words of ``group``."""
    at = ()
    for k in tl.static_range(len(MOMENT_TYPES)):
        address = tl.load(row + MOMENT + k)
        if is_grouped(MOMENT_TYPES[k]):
            codes = pointer(address, tl.uint8, PACK) + i
            at = at + ((codes, int8.words_of(address, tl.load(row + NUMEL)) + group),)
        else:
            at = at + (pointer(address, MOMENT_TYPES[k], PACK) + i,)
    return at


@triton.jit
def load_moments(at, mask, MOMENT_TYPES: tl.constexpr):
    out = ()
    for k in tl.static_range(len(MOMENT_TYPES)):
        if is_grouped(MOMENT_TYPES[k]):
            out = out + (int8.load(at[k], mask, MOMENT_TYPES[k] == tl.int8),)
        else:
            out = out + (load(at[k], mask, MOMENT_TYPES[k]),)
    return out


@triton.jit
def moment_keys(row, ahead, MOMENT_TYPES: tl.constexpr):
    """Of the random bits of those in groups. ahead: how many steps later than it is now the count is by which they are.

    (Of the others: nothing that is used.)
    """
    out = ()
    for k in tl.static_range(len(MOMENT_TYPES)):
        if is_grouped(MOMENT_TYPES[k]):
            out = out + (dither(tl.load(row + SEED), counted(row) + ahead, k),)
        else:
            out = out + (0,)
    return out


@triton.jit
def encode_moments(moments, keys, i, mask, MOMENT_TYPES: tl.constexpr):
    """As they are stored. i: of the whole parameter. (An update that moves none gives none.)"""
    out = ()
    for k in tl.static_range(len(moments)):
        if is_grouped(MOMENT_TYPES[k]):
            out = out + (int8.pack(moments[k], mask, dither_bits(keys[k], i), MOMENT_TYPES[k] == tl.int8),)
        else:
            out = out + (encode(moments[k], MOMENT_TYPES[k], False),)
    return out


@triton.jit
def decode_moments(stored, shape, MOMENT_TYPES: tl.constexpr):
    out = ()
    for k in tl.static_range(len(MOMENT_TYPES)):
        if is_grouped(MOMENT_TYPES[k]):
            out = out + (int8.unpack(stored[k], shape, MOMENT_TYPES[k] == tl.int8),)
        else:
            out = out + (decode(stored[k], MOMENT_TYPES[k]),)
    return out


@triton.jit
def store_moments(at, stored, mask, MOMENT_TYPES: tl.constexpr):
    for k in tl.static_range(len(stored)):
        if is_grouped(MOMENT_TYPES[k]):
            int8.store(at[k], stored[k], mask)
        else:
            tl.store(at[k], stored[k], mask)
