"""What a step reads and writes of a span, in the types that it is stored in: the twin of ``csrc/cpu/streams.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode_split, encode, fetch, load, noise, noise_bits, pointer, remainder, stochastic
from .table import MASTER, MOMENT, PARAM, PLACE, SEED, STEP


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
def rounded_by_chance(row, p, i, PARAM_TYPE: tl.constexpr):
    """The elements i of a span's new weight. The step has been counted already."""
    steps = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
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
def moment_pointers(row, i, MOMENT_TYPES: tl.constexpr, PACK: tl.constexpr):
    at = ()
    for k in tl.static_range(len(MOMENT_TYPES)):
        at = at + (pointer(tl.load(row + MOMENT + k), MOMENT_TYPES[k], PACK) + i,)
    return at


@triton.jit
def load_moments(at, mask, MOMENT_TYPES: tl.constexpr):
    out = ()
    for k in tl.static_range(len(MOMENT_TYPES)):
        out = out + (load(at[k], mask, MOMENT_TYPES[k]),)
    return out


@triton.jit
def encode_moments(moments, MOMENT_TYPES: tl.constexpr):
    """As they are stored. (An update that moves none gives none.)"""
    out = ()
    for k in tl.static_range(len(moments)):
        out = out + (encode(moments[k], MOMENT_TYPES[k], False),)
    return out
