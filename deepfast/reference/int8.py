"""Moments in 8 bits, in groups of 64 with a word each: ``csrc/codec/int8.h`` in plain torch.

Kept as one 1-D tensor: the codes, whole groups of them, then the words, two bytes each. torch.int8 says that codes are
signed, torch.uint8 that no value is negative. Elements are counted as their parameter's lie in memory: row after row,
or in an order that is said beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepfast.reference.codec import bits_of
from deepfast.reference.formulas import NEVER_NEGATIVE

GROUP = 64
GROUPED = frozenset((torch.int8, torch.uint8))
_AT_ONCE = 4096  # groups: what is between takes many times as much memory as codes do


def grouped_dtype(moment: str) -> torch.dtype:
    """How a moment, by its name in torch's state, is kept in 8 bits."""
    return torch.uint8 if moment in NEVER_NEGATIVE else torch.int8


Order = tuple[int, ...]
"""How elements lie in memory: the strides of a dense tensor that does not lie row after row."""


def order_of(p: Tensor) -> Order | None:
    """In which order the elements of ``p`` are counted; None: row after row."""
    if p.is_contiguous() or torch.empty_like(p, device="meta").stride() != p.stride():
        return None  # what has gaps is walked in a copy
    return p.stride()


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
    """shift and bias of each group, [groups, 1]."""
    least = (words >> 4) << 20
    if signed:
        return torch.full_like(words, 20)[:, None], least[:, None]
    shift = 12 + (words & 15)
    return shift[:, None], (least - torch.bitwise_left_shift(torch.ones_like(shift), shift))[:, None]


def _encoded(x: Tensor, words: Tensor, signed: bool, chance: Tensor) -> Tensor:
    shift, bias = _scale(words, signed)
    b = _pattern(x.abs() + _float(bias) if signed else x) & 0x7FFFFFFF
    c = b + torch.bitwise_right_shift(chance, 32 - shift) - bias >> shift
    if signed:
        return c.clamp(0, 127) | _pattern(x) >> 31 << 7
    return torch.where(b == 0, 0, c.clamp(1, 255))


def _decoded(codes: Tensor, words: Tensor, signed: bool) -> Tensor:
    shift, bias = _scale(words.int(), signed)
    codes = codes.int()
    if signed:
        size = ((codes & 127) * (1 << 20) + bias).view(torch.float32) - bias.view(torch.float32)
        return (size.view(torch.int32) | codes >> 7 << 31).view(torch.float32)
    return torch.where(codes == 0, 0, torch.bitwise_left_shift(codes, shift) + bias).view(torch.float32)


def _packed(rows: Tensor, signed: bool, chance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [groups, GROUP] and words [groups] of fp32 [groups, GROUP]."""
    words = _words(_pattern(rows) & 0x7FFFFFFF, signed)
    if chance is not None:
        return _encoded(rows, words, signed, chance), words
    middle = torch.tensor(1 << 31, device=rows.device)
    if signed:  # a greatest value that was rounded down has been a step below the top of its group
        above = words + 16
        same = (_decoded(_encoded(rows, above, signed, middle), above, signed) == rows).all(1)
        words = torch.where(same & (words >> 4 < 0x7F7 - 127), above, words)
    return _encoded(rows, words, signed, middle), words


def pack(x: Tensor, dtype: torch.dtype, chance: Tensor | None = None, order: Order | None = None) -> Tensor:
    """fp32 ``x``, of any shape, in 8 bits.

    Args:
        dtype: one of ``GROUPED``.
        chance: 32 random bits for each element, int64 [numel]; None: to nearest, and what has been unpacked comes back
            as the same values.
        order: in which elements are counted.
    """
    if order is not None:
        x = x.new_empty_strided(x.shape, order).copy_(x).as_strided((x.numel(),), (1,))
    flat, groups = x.detach().float().reshape(-1), packed_size(x.numel()) // (GROUP + 2)
    out = torch.empty(groups * (GROUP + 2), dtype=torch.uint8, device=x.device)
    codes, words = out[: groups * GROUP].view(groups, GROUP), out[groups * GROUP :].view(groups, 2)
    for first in range(0, groups, _AT_ONCE):
        some = slice(first * GROUP, (first + _AT_ONCE) * GROUP)
        drawn = None if chance is None else _rows(chance[some])
        its_codes, its_words = _packed(_rows(flat[some]), dtype == torch.int8, drawn)
        codes[first : first + _AT_ONCE] = its_codes
        words[first : first + _AT_ONCE] = torch.stack((its_words & 255, its_words >> 8), 1)
    return out.view(dtype)


def unpack(packed: Tensor, shape: torch.Size, order: Order | None = None) -> Tensor:
    """fp32 of ``shape``, of elements that are counted in ``order``, in which they then lie."""
    bytes_ = packed.view(torch.uint8)
    groups = len(bytes_) // (GROUP + 2)
    codes, halves = bytes_[: groups * GROUP].view(groups, GROUP), bytes_[groups * GROUP :].view(groups, 2).int()
    values = torch.empty(groups, GROUP, device=packed.device)
    for first in range(0, groups, _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        values[some] = _decoded(codes[some], halves[some, 0] | halves[some, 1] << 8, packed.dtype == torch.int8)
    flat = values.view(-1)[: shape.numel()]
    return flat.view(shape) if order is None else flat.as_strided(shape, order)


def _rows(flat: Tensor) -> Tensor:
    """[groups, GROUP]; what a short one lacks is zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
