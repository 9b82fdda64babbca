"""Every operation in plain torch, in any dtype up to fp64 and complex.

The oracle in tests, and what runs where no kernel does: slower, the same result to rounding. The functions have the
names and arguments of ``torch.ops.deepfast``, so a backend is whichever of the two modules is asked. None of them
reads a value back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FP16_MAX = 65504.0
_BF16_MAX_BITS = 0x7F7F


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _wide(t: Tensor) -> Tensor:
    """``t`` in the precision it is computed in: fp64 stays, everything narrower becomes fp32; complex as real pairs."""
    t = _real(t)
    return t if t.dtype == torch.float64 else t.float()


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


def statistics(grads: Sequence[Tensor]) -> Tensor:
    """[sum of squares, number of non-finite elements] over all ``grads``, fp64."""
    grads = [g.resolve_conj() for g in grads]
    squares = [_real(g).double().square().sum() for g in grads]
    non_finite = [(~_real(g).isfinite()).sum().double() for g in grads]
    return torch.stack([torch.stack(squares).sum(), torch.stack(non_finite).sum()])


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


def _average(old: Tensor, weight: Tensor, *x: Tensor) -> None:
    """old <- (1 - weight) * old + weight * product of x; the two shares of an fp32 weight add up to exactly 1."""
    weight = weight.to(old.dtype).double()
    new = weight * math.prod(t.double() for t in x)
    old.copy_((old.double() * (1 - weight) + new).clamp_(max=torch.finfo(old.dtype).max))


def _adamw(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    lr, beta1, beta2, eps, weight_decay = hyper.unbind()
    m, v = moments[:2]
    p = p * (1 - lr * weight_decay).to(p.dtype)
    _average(m, 1 - beta1, g)
    _average(v, 1 - beta2, g, g)
    v.add_(0 * g)
    if len(moments) == 3:
        v = moments[2].copy_(torch.maximum(moments[2], v))
    denominator = v.sqrt() * (1 - beta2**t).rsqrt().to(p.dtype) + eps.to(p.dtype)
    return p - (lr / (1 - beta1**t)).to(p.dtype) * (m / denominator)


# rule -> (how many moments it keeps, its formula)
RULES: dict[str, tuple[int, Callable[[Tensor, Tensor, list[Tensor], Tensor, Tensor], Tensor]]] = {
    "adamw": (2, _adamw),
    "adamw_amsgrad": (3, _adamw),
}


def step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Tensor,
    record: Tensor,
    reset_grad: bool,
) -> None:
    """One step of ``rule`` over all parameters.

    Args:
        rule: a key of ``RULES``.
        params, grads: n tensors each, any floating dtype and layout, grads[i] shaped like params[i].
        masters: n fp32 tensors, an empty one where there is none.
        moments: as many times n as the rule keeps, all first moments first.
        steps: n one-element tensors.
        hyper: fp64 [groups, k], a row being the gradient's sign (-1 to maximize) and the rule's own values.
        groups: int32 [n], each parameter's row.
        record: fp32 [3], as ``decide_`` fills it. Where found_inf > 0 nothing is written but the gradient reset.
        reset_grad: zero the gradients as well.
    """
    kept, formula = RULES[rule]
    multiplier, found_inf, _ = record.unbind()
    skipped = found_inf > 0
    for i, (param, grad, master, count, group) in enumerate(
        zip(params, grads, masters, steps, groups.tolist(), strict=True)
    ):
        own = [_real(m) for m in moments[i :: len(params)][:kept]]
        kept_param = master if master.numel() else param
        p = _wide(kept_param)
        new_moments = [_wide(m).clone() for m in own]
        row = hyper[group].to(param.device)
        t = count + 1
        g = _wide(grad.resolve_conj()).to(p.dtype) * (multiplier * row[0]).to(p.dtype)
        new = formula(p, g, new_moments, t.double().reshape(()), row[1:])
        new = torch.where(skipped, p, new)
        if master.numel():
            param.copy_(torch.where(skipped, param, round_master(new, param.dtype)))
        _real(kept_param).copy_(new)
        for old, updated in zip(own, new_moments, strict=True):
            old.copy_(torch.where(skipped, old, updated.to(old.dtype)))
        count.copy_(torch.where(skipped, count, t))
        if reset_grad:
            grad.zero_()


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
