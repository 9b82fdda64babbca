"""How values are stored, and in what precision they are computed with: what ``csrc/codec`` says, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_FP16_MAX = 65504.0
_BF16_MAX_BITS = 0x7F7F
_SMALLEST_NORMAL_FP16 = 2.0**-14
_UNIT_BELOW = 2.0**-40


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def wide(t: Tensor) -> Tensor:
    """``t`` in the precision it is computed in: fp64 stays, everything narrower becomes fp32; complex as real pairs."""
    t = real(t)
    return t if t.dtype == torch.float64 else t.float()


def master_value(master: Tensor, weight: Tensor) -> Tensor:
    """fp32: a master that is kept as ``master``, an fp32 tensor or (int16) what ``weight`` lacks."""
    if master.dtype == torch.float32:
        return master
    near = weight.float()
    bits = bits_of(near) + master.int()
    if weight.dtype == torch.float16:
        below = near - master.float() * _UNIT_BELOW
        whole = torch.where(near.abs() < _SMALLEST_NORMAL_FP16, below, _from_bits(bits))
    else:
        whole = torch.where((bits ^ bits_of(near)) < 0, near, _from_bits(bits))
    return whole if whole.stride() == near.stride() else torch.empty_like(near).copy_(whole)


def master_of(x: Tensor, dtype: torch.dtype, kept: torch.dtype) -> Tensor:
    """What is kept of fp32 ``x``, the value of a weight of ``dtype``: all of it, or (int16) what that lacks.

    See ``csrc/codec/split.h``.
    """
    if kept == torch.float32:
        return x
    near = round_master(x, dtype).float()
    missing = bits_of(x) - bits_of(near)
    if dtype == torch.float16:
        below = ((near - x) / _UNIT_BELOW).round().nan_to_num(0.0, 0.0, 0.0)
        missing = torch.where(near.abs() < _SMALLEST_NORMAL_FP16, below.int(), missing)
    return torch.where(x.isfinite(), missing.clamp(max=0x7FFF), 0).to(kept)


def refresh(master: Tensor, weight: Tensor) -> None:
    """Where a master rounds to another weight, it becomes the weight. The rest knows more than 16 bits, and stays."""
    value = master_value(master, weight)
    now = torch.where(round_master(value, weight.dtype) == weight, value, weight.float())
    master.copy_(master_of(now, weight.dtype, master.dtype))


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def round_master(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` as the 16-bit weight whose master it is: saturates; bf16 rounds half away from zero, fp16 to even.

    Infinities and NaN stay what they are.
    """
    if dtype == torch.float16:
        return torch.where(x.isfinite(), x.clamp(-_FP16_MAX, _FP16_MAX), x).to(dtype)
    if dtype == torch.bfloat16:
        bits = bits_of(x).to(torch.int64) & 0x7FFFFFFF
        magnitude = ((bits + 0x8000) >> 16).clamp(max=_BF16_MAX_BITS)
        rounded = (magnitude << 16).to(torch.int32).view(torch.float32).copysign(x)
        return torch.where(x.isfinite(), rounded, x).to(dtype)
    return x.to(dtype)
