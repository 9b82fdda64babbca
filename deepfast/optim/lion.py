"""Lion: evolved sign momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from deepfast.optim.base import Optimizer
from deepfast.optim.hyper import Value, check_betas, check_lr, require
from deepfast.optim.options import Asked


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2). Its learning rate is a third to a tenth of AdamW's.

    Args:
        params: parameters or parameter groups, any floating dtype; groups may override every option below up to
            ``maximize``.
        lr: learning rate, a float or a one-element tensor.
        betas: weights of the past in the step (first) and in the average that is kept (second).
        weight_decay: decoupled: p -= lr · weight_decay · p.
        maximize: go uphill.
        foreach, fused, capturable: accepted for compatibility; the step is always one fused pass.
        differentiable: must be False.
        **options: see :class:`deepfast.optim.Optimizer`.

    State per parameter: ``exp_avg`` (parameter's shape; fp32 unless ``state_dtype`` asks otherwise, fp64 and complex
    parameters' of their type), and ``master`` for 16-bit ones (``master="split"``: int16, "fp32": fp32; in
    ``state_dict()`` fp32).

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
            "weight_decay": weight_decay,
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
        require(0.0 <= group["weight_decay"], f"Invalid weight_decay value: {group['weight_decay']}")

    def _rule(self, group: dict[str, Any]) -> str:
        return "lion"

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        return (group["lr"], *group["betas"], group["weight_decay"])
