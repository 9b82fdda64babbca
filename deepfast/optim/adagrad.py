"""Adagrad."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from deepfast.optim.base import Optimizer
from deepfast.optim.hyper import Value, check_lr, require
from deepfast.optim.options import Asked


class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan & Singer 2011), a drop-in for :class:`torch.optim.Adagrad`.

    Args:
        params: parameters or parameter groups, any floating dtype; groups may override every option below up to
            ``eps``, and ``maximize``.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in torch. lr may be a one-element
            tensor.
        foreach, fused: accepted for compatibility; the step is always one fused pass.
        differentiable: must be False.
        **options: see :class:`deepfast.optim.Optimizer`.

    State per parameter, torch's keys: ``step`` (0-d fp32) and ``sum`` (parameter's shape; fp32 unless ``state_dtype``
    asks otherwise, fp64 and complex parameters' of their type), there from the beginning, and ``master`` for 16-bit
    parameters (``master="split"``: int16, "fp32": fp32; in ``state_dict()`` fp32).

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Asked],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)
        self._init_state((p, group) for group in self.param_groups for p in group["params"])

    def share_memory(self) -> None:
        """Moves the accumulated sums into memory that other processes may share."""
        for state in self.state.values():
            state["sum"].share_memory_()

    def _check(self, group: dict[str, Any]) -> None:
        check_lr(group)
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value"):
            require(0.0 <= group[name], f"Invalid {name} value: {group[name]}")
        require(0.0 <= group["eps"], f"Invalid epsilon value: {group['eps']}")

    def _rule(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def _initial(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        return (group["lr"], group["lr_decay"], group["weight_decay"], group["eps"])
