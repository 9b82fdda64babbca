"""Moments in 8 bits, in groups of 64 with a word each: ``csrc/codec/int8.h`` in plain torch.

Kept as one 1-D tensor: the codes, whole groups of them, then the words, two bytes each. torch.int8 says that codes are
signed, torch.uint8 that no value is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepfast.reference.codec import bits_of
from deepfast.reference.formulas import NEVER_NEGATIVE

GROUP = 64
GROUPED = frozenset((torch.int8, torch.uint8))


def grouped_dtype(moment: str) -> torch.dtype:
    """How a moment, by its name in torch's state, is kept in 8 bits."""
    return torch.uint8 if moment in NEVER_NEGATIVE else torch.int8


def packed_size(numel: int) -> int:
    """Bytes of a moment of so many elements."""
    return -(-numel // GROUP) * (GROUP + 2)


def _float(pattern: Tensor) -> Tensor:
    return torch.where(pattern >= 1 << 31, pattern - (1 << 32), pattern).to(torch.int32).view(torch.float32)


def _pattern(x: Tensor) -> Tensor:
    return bits_of(x).to(torch.int64) & 0xFFFFFFFF


def _words(sizes: Tensor, signed: bool) -> Tensor:
    """int64 [groups], of the patterns of magnitudes, int64 [groups, GROUP]."""
    greatest = sizes.amax(1)
    top = (greatest + (0x100000 if signed else 0xFFFFF) >> 20).clamp(max=0x7F7)
    top = torch.where(greatest >= 0x7F800000, 0x7F9, top)
    if signed:
        return (top - 127).clamp(min=8) << 4 | 8
    smallest = torch.where(sizes == 0, 1 << 40, sizes).amin(1)
    smallest = torch.where((smallest == 1 << 40) | (greatest > 0x7F700000), 0, smallest)
    least = torch.maximum(smallest >> 20, top - 254).clamp(min=1)
    span = (top - least).clamp(min=0)
    width = torch.stack([span >= 1 << k for k in range(8)]).sum(0)  # its length in bits
    return least << 4 | width


def _scale(words: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """shift and bias of each group, int64 [groups, 1]."""
    least = (words >> 4) << 20
    if signed:
        return torch.full_like(words, 20)[:, None], least[:, None]
    shift = 12 + (words & 15)
    return shift[:, None], (least - torch.bitwise_left_shift(torch.ones_like(shift), shift))[:, None]


def _encoded(x: Tensor, words: Tensor, signed: bool, chance: Tensor | int) -> Tensor:
    shift, bias = _scale(words, signed)
    b = _pattern(x.abs() + _float(bias) if signed else x) & 0x7FFFFFFF
    c = b + torch.bitwise_right_shift(torch.as_tensor(chance, device=x.device), 32 - shift) - bias >> shift
    if signed:
        return c.clamp(0, 127) | _pattern(x) >> 31 << 7
    return torch.where(b == 0, 0, c.clamp(1, 255))


def _decoded(codes: Tensor, words: Tensor, signed: bool) -> Tensor:
    shift, bias = _scale(words, signed)
    if signed:
        size = _float((codes & 127) * (1 << 20) + bias) - _float(bias)
        return _float(_pattern(size) | codes >> 7 << 31)
    return _float(torch.where(codes == 0, 0, torch.bitwise_left_shift(codes, shift) + bias))


def pack(x: Tensor, dtype: torch.dtype, chance: Tensor | None = None) -> Tensor:
    """fp32 ``x``, of any shape, row after row in 8 bits.

    Args:
        dtype: a key of ``GROUPED``.
        chance: 32 random bits for each element, as int64; None: to nearest, and what has been unpacked comes back as
            the same values.
    """
    signed, numel = dtype == torch.int8, x.numel()
    missing = packed_size(numel) // (GROUP + 2) * GROUP - numel
    rows = torch.nn.functional.pad(x.detach().float().reshape(-1), (0, missing)).view(-1, GROUP)
    words = _words(_pattern(rows) & 0x7FFFFFFF, signed) if rows.numel() else torch.zeros_like(rows[:, 0]).long()
    if chance is None:
        codes = _encoded(rows, words, signed, 1 << 31)
        if signed:  # a greatest value that was rounded down has been a step below the top of its group
            above = words + 16
            same = (_decoded(_encoded(rows, above, True, 1 << 31), above, True) == rows).all(1)
            words = torch.where(same & (words >> 4 < 0x7F7 - 127), above, words)
            codes = _encoded(rows, words, True, 1 << 31)
    else:
        drawn = torch.nn.functional.pad(chance.reshape(-1), (0, missing)).view(-1, GROUP)
        codes = _encoded(rows, words, signed, drawn)
    halves = torch.stack((words & 255, words >> 8), 1)
    return torch.cat((codes.reshape(-1), halves.reshape(-1))).to(torch.uint8).view(dtype)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """fp32 of ``shape``, row after row."""
    bytes_ = packed.view(torch.uint8).to(torch.int64)
    groups = len(bytes_) // (GROUP + 2)
    codes, halves = bytes_[: groups * GROUP].view(-1, GROUP), bytes_[groups * GROUP :].view(-1, 2)
    values = _decoded(codes, halves[:, 0] | halves[:, 1] << 8, packed.dtype == torch.int8)
    return values.reshape(-1)[: shape.numel()].view(shape)
