"""The functions and the ``Plan`` of :mod:`deepfast.reference`, on Triton's kernels.

All arguments and results are the reference's. RuntimeError for tensors that do not fit, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import accumulate, scaler
from . import statistics as sums
from .checks import check_count, check_dtype, check_question, check_values, require, type_name, written
from .collectives import collective_, peer_layout
from .order import ElementOrder
from .plan import Plan
from .table import Table, span_of

__all__ = [
    "Plan",
    "accumulate_",
    "collective_",
    "decide_",
    "peer_layout",
    "scaler_update_",
    "statistics",
    "step_",
]


def statistics(grads: Sequence[Tensor]) -> Tensor:
    """fp64 [2]: the sum of squares over all ``grads``, and > 0 where an element is not finite."""
    device = grads[0].device
    order, spans = ElementOrder(device), []
    for grad in grads:
        order.follow(grad)
        address, dtype = order.read(grad, "a gradient"), check_dtype(grad, "a gradient")
        spans.append(span_of((0, dtype), (address, dtype), grad.numel()))
    return sums.statistics(Table(spans, device))


def decide_(
    record: Tensor,
    statistics: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float,
    check: bool,
) -> None:
    """Fills ``record`` (fp32 [3]: multiplier, found_inf, grad_norm) from ``statistics`` (fp64 [2], or None)."""
    require(
        statistics is not None or (max_norm == 0.0 and not check),
        "clipping and the check for non-finite gradients need the statistics",
    )
    check_values(record, 3, "the record", record.device)
    check_question(grad_scale, found_inf, record.device)
    if statistics is not None:
        check_values(statistics, 2, "statistics", record.device, torch.float64)
    sums.decide(record, statistics, grad_scale, found_inf, max_norm, check)
    written([record])


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
    """One step of ``rule`` without keeping a plan."""
    plan = Plan(rule, params, masters, moments, steps, groups)
    plan.trust()
    check_count(grads, len(params), "gradients")
    for grad in grads:
        check_dtype(grad, "a gradient")
    require(
        plan.gather(grads, reset_grad) != Plan.STALE,
        "parameters and gradients must be dense tensors on one device",
    )
    plan.step(hyper, [], record, plan.norms(hyper, [], record) if plan.needs_norms() else None)


def accumulate_(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float, overwrite: bool) -> None:
    """sums[i] = weight * grads[i], or += without ``overwrite``; the sums fp32, the gradients fp32, fp16 or bf16."""
    check_count(grads, len(sums), "gradients")
    device = sums[0].device
    order, spans = ElementOrder(device), []
    for total, grad in zip(sums, grads, strict=True):
        order.follow(total)
        require(total.dtype == torch.float32, f"a sum has dtype {type_name(total)}")
        addresses = order.write(total, "a sum"), order.read(grad, "a gradient")
        dtype = check_dtype(grad, "a gradient")
        spans.append(span_of((addresses[0], total.dtype), (addresses[1], dtype), total.numel()))
    accumulate.accumulate(Table(spans, device), weight, overwrite)
    order.write_back()
    written(sums)


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
    """The loss scaler's transition over ``state`` (fp32 [4]: scale, growth tracker, hysteresis left, skipped)."""
    check_values(state, 4, "the scaler's state", state.device)
    for found in found_inf:
        check_values(found, 1, "found_inf", state.device)
    scaler.update(
        state,
        list(found_inf),
        float(growth_factor),
        float(backoff_factor),
        growth_interval,
        hysteresis,
        consecutive_hysteresis,
        dynamic,
        float(min_scale),
        float(max_scale),
    )
    written([state])
