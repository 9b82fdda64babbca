"""Random bits that are a function of where and when, and rounding by them: ``csrc/codec/noise.h`` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from deepfast.reference.codec import bits_of

_WORD = 0xFFFFFFFF


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift of 64 bits."""
    return (x >> by) & ((1 << 64 - by) - 1)


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _key(seed: int, step: Tensor) -> Tensor:
    x = step.reshape(()).to(torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def noise(seed: int, step: Tensor, first: int, like: Tensor) -> Tensor:
    """int64, of the shape of ``like``: 32 random bits for each element, counted as they lie in memory, from ``first``.

    Args:
        seed: the parameter's, 64 bits.
        step: how many steps it has seen, this one included; one value.
    """
    x = _key(seed, step)
    before, between = x & _WORD, _shifted(x, 32)
    i = torch.empty_like(like, dtype=torch.int64)
    flat = torch.arange(first, first + like.numel(), device=like.device)
    i = flat.as_strided(i.shape, i.stride()) + before & _WORD
    i = (i ^ i >> 16) * 0x7FEB352D & _WORD
    i = (i ^ i >> 15 ^ between) * 0x846CA68B & _WORD
    return i ^ i >> 16


def dither(seed: int, step: Tensor, moment: int, first: int, numel: int) -> Tensor:
    """int64 [numel]: the cheaper bits of a moment, by its place among the rule's; the rest as in ``noise``."""
    moment_seed = (seed + (moment + 1) * 0xE7037ED1A0B428DB) % (1 << 64)
    key = _key(moment_seed, step) & _WORD
    return key + torch.arange(first, first + numel, device=step.device) * 0x9E3779B9 & _WORD


def stochastic(x: Tensor, dtype: torch.dtype, chance: Tensor) -> Tensor:
    """fp32 ``x`` as fp16 or bf16, up or down so that it is right on average; saturates. chance: 16 random bits each."""
    bits = bits_of(x).to(torch.int64)
    size = bits & 0x7FFFFFFF
    if dtype == torch.float16:
        normal = ((size - (112 << 23) + (chance >> 3)) >> 13).clamp(max=0x7BFF)
        below = (x.abs().clamp(max=2.0**-14) * 2.0**40).to(torch.int64) + chance >> 16
        rounded = torch.where(size < 0x38800000, below, normal)
    else:
        rounded = (size + chance >> 16).clamp(max=0x7F7F)
    halves = torch.where(bits < 0, rounded - 0x8000, rounded).to(torch.int16)
    return torch.where(x.isfinite(), halves.view(dtype), x.to(dtype))
