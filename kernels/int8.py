"""Moments in 8 bits, a 16-bit word to each group of 64: the twin of ``csrc/codec/int8.h``, equal to it in every bit.

Groups are rows here: what is one-dimensional is reshaped to [groups, GROUP]. (Threads keep what they have: a group is
neighbours.) A group that the mask leaves out in part is whole in memory: what it lacks is zeros, and has no say in its
word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codec import INFINITY, MAGNITUDE, SIGN, fetch

GROUP = tl.constexpr(64)
MOST = tl.constexpr(127)  # the greatest code of a signed moment,
MOST_POSITIVE = tl.constexpr(255)  # and of one that is never negative
TOP = tl.constexpr(0x7F7)  # upper bits of the greatest finite value,
TOP_NAN = tl.constexpr(0x7F9)  # and of a group with others: NaN
HUGE = tl.constexpr(0x7F700000)


@triton.jit
def words_of(codes, numel):
    """Where the words of a moment lie: behind its codes, whole groups of them. codes: an address, as int64."""
    return (codes + tl.cdiv(numel, GROUP) * GROUP).to(tl.pointer_type(tl.uint16))


@triton.jit
def in_groups(x):
    return tl.reshape(x, [x.numel // GROUP, GROUP])


@triton.jit
def has_any(mask):
    """[groups, 1]: which groups have elements."""
    return tl.max(in_groups(mask.to(tl.int32)), 1, keep_dims=True) > 0


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale(word, SIGNED: tl.constexpr):
    """int32 shift and bias: a code's pattern is (c << shift) + bias; of the signed, bias is also that of the floor."""
    least = (word.to(tl.int32) >> 4) << 20
    if SIGNED:
        shift, bias = tl.full(word.shape, 20, tl.int32), least
    else:
        shift = 12 + (word.to(tl.int32) & 15)
        bias = least - (tl.full(word.shape, 1, tl.int32) << shift)
    return shift, bias


@triton.jit
def word_of(x, SIGNED: tl.constexpr):
    """uint16 [groups, 1], of fp32 [groups, GROUP]."""
    sizes = x.to(tl.uint32, bitcast=True) & MAGNITUDE
    greatest = tl.max(sizes, 1, keep_dims=True)
    top = ((greatest + (0x100000 if SIGNED else 0xFFFFF)) >> 20).to(tl.int32)
    top = tl.where(greatest >= INFINITY, TOP_NAN, tl.minimum(top, TOP))
    if SIGNED:
        least = tl.maximum(top - MOST, 8)
        width = 8
    else:
        # Minus the least that is not zero's; 0 where there is none.
        negated = tl.max(tl.sub(0, sizes, sanitize_overflow=False), 1, keep_dims=True)
        smallest = (tl.sub(0, negated, sanitize_overflow=False) >> 20).to(tl.int32)
        smallest = tl.where(greatest > HUGE, 0, smallest)  # MOST_POSITIVE must be top itself: the rest is cut to it
        least = tl.maximum(tl.maximum(smallest, top - (MOST_POSITIVE - 1)), 1)
        length = ((top - least).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126  # in bits
        width = tl.where(top > least, length, 0)
    return ((least << 4) | width).to(tl.uint16)


@triton.jit
def decode(code, word, SIGNED: tl.constexpr):
    """fp32. code: uint8 [groups, GROUP]; word: [groups, 1]."""
    shift, bias = scale(word, SIGNED)
    if SIGNED:
        size = float_of(((code & 127).to(tl.int32) << shift) + bias) - float_of(bias)
        decoded = float_of(size.to(tl.uint32, bitcast=True) | ((code & 128).to(tl.uint32) << 24))
    else:
        decoded = float_of(tl.where(code == 0, 0, (code.to(tl.int32) << shift) + bias))
    return decoded


@triton.jit
def encode(x, word, chance, SIGNED: tl.constexpr):
    """uint8 [groups, GROUP]. word: the groups' own; chance: 32 random bits each, as uint32."""
    shift, bias = scale(word, SIGNED)
    size = tl.abs(x) + float_of(bias) if SIGNED else x
    b = size.to(tl.uint32, bitcast=True) & MAGNITUDE
    c = tl.add(b, chance >> (32 - shift).to(tl.uint32), sanitize_overflow=False)
    c = tl.sub(c, bias.to(tl.uint32, bitcast=True), sanitize_overflow=False).to(tl.int32, bitcast=True) >> shift
    if SIGNED:
        sign = (x.to(tl.uint32, bitcast=True) & SIGN) >> 24
        encoded = tl.minimum(c, MOST).to(tl.uint32) | sign
    else:
        encoded = tl.where(b == 0, 0, tl.maximum(tl.minimum(c, MOST_POSITIVE), 1))
    return encoded.to(tl.uint8)


@triton.jit
def load(at, mask, SIGNED: tl.constexpr):
    """fp32, in the shape of the pointers to codes. at: those, and [groups, 1] to words."""
    codes, words = at
    word = fetch(words, None if mask is None else has_any(mask))
    return tl.reshape(decode(in_groups(fetch(codes, mask)), word, SIGNED), codes.shape)


@triton.jit
def pack(x, mask, chance, SIGNED: tl.constexpr):
    """Codes and words, [groups, GROUP] and [groups, 1], of fp32 ``x`` in any shape."""
    rows = in_groups(x if mask is None else tl.where(mask, x, 0.0))
    word = word_of(rows, SIGNED)
    return encode(rows, word, in_groups(chance), SIGNED), word


@triton.jit
def unpack(packed, shape, SIGNED: tl.constexpr):
    code, word = packed
    return tl.reshape(decode(code, word, SIGNED), shape)


@triton.jit
def store(at, packed, mask):
    codes, words = at
    code, word = packed
    if mask is None:
        tl.store(in_groups(codes), code)
        tl.store(words, word)
    else:
        live = has_any(mask)
        tl.store(in_groups(codes), code, tl.broadcast_to(live, code.shape))
        tl.store(words, word, live)
