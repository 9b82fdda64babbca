"""How values are stored, and in what precision they are computed with: what ``csrc/codec`` says, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_FP16_MAX = 65504.0
_BF16_MAX_BITS = 0x7F7F


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def wide(t: Tensor) -> Tensor:
    """``t`` in the precision it is computed in: fp64 stays, everything narrower becomes fp32; complex as real pairs."""
    t = real(t)
    return t if t.dtype == torch.float64 else t.float()


def refresh(master: Tensor, weight: Tensor) -> None:
    """Where a master rounds to another weight, it becomes the weight. The rest knows more than 16 bits, and stays."""
    master.copy_(torch.where(round_master(master, weight.dtype) == weight, master, weight.float()))


def round_master(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` as the 16-bit weight whose master it is: saturates; bf16 rounds half away from zero, fp16 to even.

    Infinities and NaN stay what they are.
    """
    if dtype == torch.float16:
        return torch.where(x.isfinite(), x.clamp(-_FP16_MAX, _FP16_MAX), x).to(dtype)
    if dtype == torch.bfloat16:
        bits = x.contiguous().view(torch.int32).to(torch.int64) & 0x7FFFFFFF
        magnitude = ((bits + 0x8000) >> 16).clamp(max=_BF16_MAX_BITS)
        rounded = (magnitude << 16).to(torch.int32).view(torch.float32).copysign(x)
        return torch.where(x.isfinite(), rounded, x).to(dtype)
    return x.to(dtype)
