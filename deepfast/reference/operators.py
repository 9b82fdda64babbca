"""The operators that keep nothing: the gradients' statistics, the step's record, sums, the loss scale."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from deepfast.reference.codec import real


def statistics(grads: Sequence[Tensor]) -> Tensor:
    """[sum of squares, number of non-finite elements] over all ``grads``, fp64."""
    grads = [g.resolve_conj() for g in grads]
    squares = [real(g).double().square().sum() for g in grads]
    non_finite = [(~real(g).isfinite()).sum().double() for g in grads]
    return torch.stack([torch.stack(squares).sum(), torch.stack(non_finite).sum()])


def reduced(tensors: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """The sum over the ranks' ``tensors``, times ``factor`` (1 / ranks for a mean); see ``csrc/math/collective.h``.

    16-bit tensors and fp32 ones are added in fp32, in rank order, and rounded once; a sum beyond fp32's range is formed
    again in fp64 before it is multiplied, so the mean of finite values is finite.
    """
    dtype = tensors[0].dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        total = functools.reduce(torch.add, tensors)
        return total * factor if dtype == torch.float64 else total
    factor32 = torch.tensor(factor, dtype=torch.float32)
    narrow = functools.reduce(torch.add, [t.float() for t in tensors]) * factor32
    wide = functools.reduce(torch.add, [t.double() for t in tensors]) * factor32.double()
    return torch.where(narrow.isfinite(), narrow, wide.float()).to(dtype)


def decide_(
    record: Tensor,
    statistics: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float,
    check: bool,
) -> None:
    """Fills ``record`` (fp32[3]: multiplier, found_inf, grad_norm); see ``csrc/math/record.h``."""
    scale = record.new_ones((), dtype=torch.float64) if grad_scale is None else grad_scale.reshape(()).double()
    found = record.new_zeros(()) if found_inf is None else (found_inf.reshape(()) > 0).float()
    norm = record.new_zeros(())
    clip = torch.ones_like(scale)
    if statistics is not None:
        norm = (statistics[0].sqrt() / scale).float()
        if check:
            found = torch.maximum(found, (statistics[1] > 0).float())
        if max_norm > 0:
            clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    record.copy_(torch.stack([(clip / scale).float(), found, norm]))


def accumulate_(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float, overwrite: bool) -> None:
    """sums[i] = weight * grads[i], or += without ``overwrite``; fp32."""
    for total, grad in zip(sums, grads, strict=True):
        if overwrite:
            total.copy_(grad).mul_(weight)
        else:
            total.add_(grad.to(total.dtype), alpha=weight)


def scaler_update_(
    state: Tensor,
    found_inf: Sequence[Tensor],
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
    consecutive_hysteresis: bool,
    dynamic: bool,
    min_scale: float,
    max_scale: float,
) -> None:
    """The loss scaler's transition over ``state`` (fp32[4]: scale, growth tracker, hysteresis left, skipped steps)."""
    scale, tracker, left, skipped = state.unbind()
    overflow = torch.stack([f.reshape(()).to(state.device) > 0 for f in found_inf]).any()
    skipped = skipped + overflow
    if dynamic:
        left_overflow = (left - 1).clamp(min=0)
        backed_off = torch.maximum(scale.double() * backoff_factor, scale.double().clamp(max=min_scale)).float()
        grows = tracker + 1 >= growth_interval
        grown = torch.where(grows, (scale.double() * growth_factor).clamp(max=max_scale).float(), scale)
        refilled = torch.full_like(left, hysteresis)
        left_clean = refilled if consecutive_hysteresis else torch.where(grows, refilled, left)
        scale = torch.where(overflow, torch.where(left_overflow == 0, backed_off, scale), grown)
        tracker = torch.where(overflow | grows, torch.zeros_like(tracker), tracker + 1)
        left = torch.where(overflow, left_overflow, left_clean)
    state.copy_(torch.stack([scale, tracker, left, skipped]))
