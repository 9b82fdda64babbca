"""LAMB: Adam's direction, a step as long as each layer allows."""

from __future__ import annotations

from math import inf
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from deepfast.optim.base import Optimizer
from deepfast.optim.hyper import Value, check_betas, check_lr, require
from deepfast.optim.options import Asked


class LAMB(Optimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2), for large batches.

    Args:
        params: parameters or parameter groups, any floating dtype; groups may override every option below up to
            ``maximize``.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the two moments; both are corrected for their bias.
        eps: added to the denominator.
        weight_decay: added to the direction, before its norm is taken.
        phi: bounds of the paper's φ: a parameter's norm is taken as at least the first and at most the second.
        maximize: go uphill.
        foreach, fused, capturable: accepted for compatibility; the step is always two fused passes.
        differentiable: must be False.
        **options: see :class:`deepfast.optim.Optimizer`.

    A parameter (a DTensor: with all its shards) is a layer. Where its norm or that of its direction is zero, the trust
    ratio is 1. State per parameter as in :class:`deepfast.Adam`: ``step``, ``exp_avg``, ``exp_avg_sq``, ``master``.

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        phi: tuple[float, float] = (0.0, inf),
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Asked],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "phi": phi,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def _check(self, group: dict[str, Any]) -> None:
        check_lr(group)
        check_betas(group)
        require(0.0 <= group["eps"], f"Invalid epsilon value: {group['eps']}")
        require(0.0 <= group["weight_decay"], f"Invalid weight_decay value: {group['weight_decay']}")
        require(len(group["phi"]) == 2, f"Invalid phi: {group['phi']}, there must be two")
        lower, upper = group["phi"]
        require(0.0 <= lower <= upper, f"Invalid phi: {group['phi']}, the bounds must be 0 <= lower <= upper")

    def _rule(self, group: dict[str, Any]) -> str:
        return "lamb"

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"], *group["phi"])
