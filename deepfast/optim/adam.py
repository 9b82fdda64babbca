"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepfast.optim.base import Optimizer


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), a drop-in for :class:`torch.optim.AdamW`.

    Args:
        params: parameters or parameter groups, any floating dtype; groups may override every option below up to
            ``maximize``.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch. lr and betas may be one-element tensors.
        foreach, capturable: accepted for compatibility; the step is always one fused pass.
        fused: False runs the plain-torch reference.
        differentiable: must be False.
        **options: see :class:`deepfast.optim.Optimizer`.

    State per parameter, torch's keys: ``step`` (0-d fp32), ``exp_avg``, ``exp_avg_sq``, with amsgrad
    ``max_exp_avg_sq`` (parameter's shape, fp32; fp64 for fp64 parameters), and ``master`` (fp32) for 16-bit ones.

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # torch writes it into a state_dict
        }
        super().__init__(params, defaults, **options)

    def _check(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for name, value in (("lr", group["lr"]), ("betas[0]", beta1), ("betas[1]", beta2)):
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
        if not 0.0 <= group["lr"]:
            raise ValueError(f"Invalid learning rate: {group['lr']}")
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for i, beta in enumerate((beta1, beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")

    def _rule(self, group: dict[str, Any]) -> str:
        return "adamw_amsgrad" if group["amsgrad"] else "adamw"

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
