"""How values are stored: fp32, fp16, bf16. The twin of ``csrc/codec/half.h``, equal to it in every bit.

fp16 goes through the hardware's casts, bf16 through its bits: Triton's interpreter computes bf16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
SIGN = tl.constexpr(0x80000000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
BF16_MAX = tl.constexpr(0x7F7F)


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
def load(at, mask, DTYPE: tl.constexpr):
    """DTYPE, 16 bits as fp32; what the mask leaves out is zero."""
    return decode(tl.load(at) if mask is None else tl.load(at, mask=mask, other=0), DTYPE)
