"""The loss scaler's transition, in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import transition
from .table import launch


@triton.jit(do_not_specialize=["count"])
def scaler_kernel(
    state,  # fp32 [4]: scale, growth tracker, hysteresis left, skipped steps
    found_inf,  # fp32 [count]
    count,
    GROWTH: tl.constexpr,
    BACKOFF: tl.constexpr,
    INTERVAL: tl.constexpr,
    HYSTERESIS: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """The options are compiled in: an argument would be rounded to fp32."""
    overflow = tl.full([], False, tl.int1)
    for i in range(count):
        overflow = overflow | (tl.load(found_inf + i) > 0)
    new = transition(tl.load(state), tl.load(state + 1), tl.load(state + 2), tl.load(state + 3), overflow,
                     GROWTH, BACKOFF, INTERVAL, HYSTERESIS, CONSECUTIVE, DYNAMIC, SMALLEST, LARGEST)  # fmt: skip
    for k in tl.static_range(4):
        tl.store(state + k, new[k])


def update(state: Tensor, found_inf: list[Tensor], *options: float) -> None:
    """options: those of :func:`deepfast.reference.scaler_update_`, in its order."""
    found = torch.cat([f.reshape(1) for f in found_inf])
    launch(scaler_kernel, 1, state.device, state, found, len(found), *options, num_warps=1)
