"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from deepfast.optim.base import Optimizer
from deepfast.optim.hyper import Value, check_lr, require
from deepfast.optim.options import Asked


class SGD(Optimizer):
    """SGD, a drop-in for :class:`torch.optim.SGD`; momentum as in Sutskever et al. 2013.

    Args:
        params: parameters or parameter groups, any floating dtype; groups may override every option below up to
            ``maximize``.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch. lr may be a one-element tensor.
        foreach, fused: accepted for compatibility; the step is always one fused pass.
        differentiable: must be False.
        **options: see :class:`deepfast.optim.Optimizer`.

    State per parameter: with momentum ``momentum_buffer`` (torch's key; parameter's shape; fp32 unless ``state_dtype``
    asks otherwise, fp64 and complex parameters' of their type) and ``step`` (0-d fp32: dampening leaves out the first
    step, and whether that was skipped is known only on the device), and ``master`` for 16-bit parameters
    (``master="split"``: int16, "fp32": fp32; in ``state_dict()`` fp32).

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    _uncounted = 1.0  # torch's does not count, but what it has kept has begun

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Asked],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def _check(self, group: dict[str, Any]) -> None:
        check_lr(group)
        momentum, dampening = group["momentum"], group["dampening"]
        require(0.0 <= momentum, f"Invalid momentum value: {momentum}")
        require(0.0 <= group["weight_decay"], f"Invalid weight_decay value: {group['weight_decay']}")
        if group["nesterov"]:
            require(momentum > 0 and dampening == 0, "Nesterov momentum requires a momentum and zero dampening")

    def _rule(self, group: dict[str, Any]) -> str:
        return "sgd_momentum" if group["momentum"] else "sgd"

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        return (group["lr"], group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"])
