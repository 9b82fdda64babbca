"""How values are stored: the twin of ``csrc/codec``, equal to it in every bit.

fp16 goes through the hardware's casts, bf16 through its bits: Triton's interpreter computes bf16 wrongly. Where
integers wrap, the source says so: Triton's debug mode takes any other overflow for a mistake.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
SIGN = tl.constexpr(0x80000000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
BF16_MAX = tl.constexpr(0x7F7F)
FP16_MAX_BITS = tl.constexpr(0x7BFF)
FP16_NORMAL = tl.constexpr(2.0**-14)  # the smallest one
FP16_BIAS = tl.constexpr(112 << 23)  # fp32's exponents begin so much earlier
UNIT_BELOW = tl.constexpr(2.0**-40)  # what a split fp16 is counted in below FP16_NORMAL
WHOLE = tl.constexpr(1.5 * 2.0**23)  # added to a small number, it leaves the nearest integer in the last bits
WHOLE_BITS = tl.constexpr(0x4B400000)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """The int64 ``address`` as a pointer to DTYPE (bf16: its bits); PACK elements from there lie aligned together.

    Nothing is known of an address out of a table, and accesses would be of one element. 16-bit streams are said to be
    aligned to no more elements than the fp32 streams beside them, so that all are dealt out to threads alike.
    """
    if DTYPE == tl.bfloat16:
        at = address.to(tl.pointer_type(tl.uint16))
    else:
        at = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(at, PACK * DTYPE.primitive_bitwidth // 8)


@triton.jit
def decode(x, DTYPE: tl.constexpr):
    """16 bits as fp32; other types stay."""
    if DTYPE == tl.bfloat16:
        decoded = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        decoded = x.to(tl.float32)
    else:
        decoded = x
    return decoded


@triton.jit
def bf16_nearest_even(x):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > INFINITY, (bits >> 16) | 0x40, rounded).to(tl.uint16)


@triton.jit
def bf16_from_master(x):
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & MAGNITUDE
    rounded = (magnitude + 0x8000) >> 16  # half away from zero
    rounded = tl.where(rounded > BF16_MAX, BF16_MAX, rounded)
    rounded = tl.where(magnitude >= INFINITY, magnitude >> 16, rounded)
    rounded = tl.where(magnitude > INFINITY, (magnitude >> 16) | 0x40, rounded)
    return (((bits & SIGN) >> 16) | rounded).to(tl.uint16)


@triton.jit
def fp16_saturated(x):
    over = (tl.abs(x) > FP16_MAX) & (tl.abs(x) < float("inf"))
    return tl.where(over, tl.where(x > 0, FP16_MAX, -FP16_MAX), x)


@triton.jit
def encode(x, DTYPE: tl.constexpr, MASTER: tl.constexpr):
    """MASTER: by the rule for weights whose fp32 value is kept elsewhere, else torch's."""
    if DTYPE == tl.bfloat16:
        encoded = bf16_from_master(x) if MASTER else bf16_nearest_even(x)
    elif DTYPE == tl.float16:
        encoded = (fp16_saturated(x) if MASTER else x).to(tl.float16)
    else:
        encoded = x
    return encoded


@triton.jit
def fetch(at, mask):
    """What is stored; what the mask leaves out is zero."""
    return tl.load(at) if mask is None else tl.load(at, mask=mask, other=0)


@triton.jit
def load(at, mask, DTYPE: tl.constexpr):
    """DTYPE, 16 bits as fp32; what the mask leaves out is zero."""
    return decode(fetch(at, mask), DTYPE)


# csrc/codec/split.h: a master in two bytes, beside the 16-bit parameter that it rounds to.


@triton.jit
def decode_split(half, remainder, DTYPE: tl.constexpr):
    """fp32, of a parameter (as it is stored) and what it lacks (int16)."""
    near = decode(half, DTYPE)
    missing = remainder.to(tl.int32)
    upper = near.to(tl.uint32, bitcast=True)
    bits = tl.add(upper, missing.to(tl.uint32, bitcast=True), sanitize_overflow=False)
    whole = bits.to(tl.float32, bitcast=True)
    if DTYPE == tl.bfloat16:  # a zero that somebody has written over a weight may have anything beside it
        decoded = tl.where(((bits ^ upper) & SIGN) != 0, near, whole)
    else:
        decoded = tl.where(tl.abs(near) < FP16_NORMAL, tl.fma(missing.to(tl.float32), -UNIT_BELOW, near), whole)
    return decoded


@triton.jit
def remainder(x, half, DTYPE: tl.constexpr):
    """int16: what ``half``, fp32 ``x`` encoded as one with a master, lacks."""
    near = decode(half, DTYPE)
    bits = x.to(tl.uint32, bitcast=True)
    missing = tl.sub(bits, near.to(tl.uint32, bitcast=True), sanitize_overflow=False).to(tl.int32, bitcast=True)
    if DTYPE == tl.float16:
        below = ((near - x) * (1.0 / UNIT_BELOW) + WHOLE).to(tl.uint32, bitcast=True)
        below = tl.sub(below, WHOLE_BITS, sanitize_overflow=False).to(tl.int32, bitcast=True)
        missing = tl.where(tl.abs(near) < FP16_NORMAL, below, missing)
    missing = tl.where(missing > 0x7FFF, 0x7FFF, missing)
    return tl.where((bits & MAGNITUDE) < INFINITY, missing, 0).to(tl.int16)


# csrc/codec/noise.h: random bits that are a function of where and when.


@triton.jit
def noise(seed, step):
    """Of one parameter (its seed: int64) at one step (fp32): the key of its elements' bits, two uint32."""
    x = tl.mul(step.to(tl.int64).to(tl.uint64, bitcast=True), 0x9E3779B97F4A7C15, sanitize_overflow=False)
    x = tl.add(seed.to(tl.uint64, bitcast=True), x, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 30), 0xBF58476D1CE4E5B9, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 27), 0x94D049BB133111EB, sanitize_overflow=False)
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def noise_bits(key, i):
    """Of the elements i of the whole parameter: 32 bits each."""
    before, between = key
    x = tl.add(i.to(tl.uint32), before, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15) ^ between, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def dither(seed, step, MOMENT: tl.constexpr):
    """Of one moment of a parameter (by its place among the rule's) at one step: cheaper bits' key, uint32."""
    apart: tl.constexpr = ((MOMENT + 1) * 0xE7037ED1A0B428DB) & 0xFFFFFFFFFFFFFFFF
    key, _ = noise(tl.add(seed.to(tl.uint64, bitcast=True), apart, sanitize_overflow=False), step)
    return key


@triton.jit
def dither_bits(key, i):
    """Of the elements i of the whole parameter: 32 bits each, evenly spread."""
    return tl.add(key, tl.mul(i.to(tl.uint32), 0x9E3779B9, sanitize_overflow=False), sanitize_overflow=False)


@triton.jit
def stochastic(x, chance, DTYPE: tl.constexpr):
    """Up or down, right on average, for a weight without a master; chance: 16 random bits, as uint32.

    Saturates; infinities and NaN stay what they are.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & MAGNITUDE
    if DTYPE == tl.bfloat16:
        rounded = tl.add(magnitude, chance, sanitize_overflow=False) >> 16
        rounded = tl.where(rounded > BF16_MAX, BF16_MAX, rounded)
        rounded = (((bits & SIGN) >> 16) | rounded).to(tl.uint16)
    else:
        normal = tl.sub(magnitude, FP16_BIAS, sanitize_overflow=False)
        normal = tl.add(normal, chance >> 3, sanitize_overflow=False) >> 13
        normal = tl.where(normal > FP16_MAX_BITS, FP16_MAX_BITS, normal)
        is_below = tl.abs(x) < FP16_NORMAL  # its last place is 2^-24, 2^16 of the units that are rounded
        units = (tl.where(is_below, tl.abs(x), 0.0) * (1.0 / UNIT_BELOW)).to(tl.uint32)
        rounded = tl.where(is_below, (units + chance) >> 16, normal)
        rounded = (((bits & SIGN) >> 16) | rounded).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.where(magnitude < INFINITY, rounded, encode(x, DTYPE, False))
