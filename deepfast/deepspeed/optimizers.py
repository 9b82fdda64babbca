"""DeepSpeed's optimizers by its names and with its defaults: deepfast's in everything else, on a CPU and on a GPU.

Where ``fp32_optimizer_states`` is False moments have the parameter's type. All take deepfast's options, too.
"""

from __future__ import annotations

from math import inf
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepfast.deepspeed.logs import warning_once
from deepfast.optim import LAMB, Adagrad, Adam, AdamW, Lion

Betas = tuple[float | Tensor, float | Tensor]


def _refuse(optimizer: Any, wrong: bool, instead: str) -> None:
    if wrong:
        raise ValueError(f"{type(optimizer).__name__}: {instead}")


def _stored(fp32_optimizer_states: bool, options: dict[str, Any]) -> dict[str, Any]:
    return options if fp32_optimizer_states else {"state_dtype": "param", **options}


class _EitherAdam(Adam):
    """Adam whose weight decay is decoupled or not as its constructor says, whatever a checkpoint says."""

    _not_loaded = AdamW._not_loaded

    def __init__(self, params: ParamsT, bias_correction: bool, decoupled: bool, **options: Any) -> None:
        if not bias_correction:
            options["bias_correction"] = False
        # type(o)(params, **o.defaults) has it under our name
        super().__init__(params, **{"decoupled_weight_decay": decoupled, **options})
        self.adam_w_mode = bool(self.defaults["decoupled_weight_decay"])


class FusedAdam(_EitherAdam):
    """AdamW, or with ``adam_w_mode=False`` Adam."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        **options: Any,
    ) -> None:
        _refuse(self, not set_grad_none, "set_grad_none=False: call zero_grad(set_to_none=False) instead")
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, bias_correction, adam_w_mode, **given, **options)


class DeepSpeedCPUAdam(_EitherAdam):
    """AdamW, or with ``adamw_mode=False`` Adam, wherever the parameters are."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
        **options: Any,
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        stored = _stored(fp32_optimizer_states, options)
        super().__init__(model_params, bias_correction, adamw_mode, **given, **stored)


class FusedLamb(LAMB):
    """LAMB as its paper has it. DeepSpeed's differs: it corrects the bias after the trust ratio, which it bounds."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        _refuse(self, not bias_correction, "bias_correction=False: LAMB corrects both moments; leave it out")
        _refuse(self, eps_inside_sqrt, "eps_inside_sqrt=True: eps is added to the root; leave it out")
        _refuse(self, amsgrad, "amsgrad=True: LAMB has no such variant; leave it out")
        unbounded = (max_coeff, min_coeff) == (inf, 0.0)
        bounded = not unbounded and (max_coeff, min_coeff) != (10.0, 0.01)
        _refuse(self, bounded, "max_coeff, min_coeff: the trust ratio is not bounded; phi= bounds the weights' norms")
        if not unbounded:
            warning_once("FusedLamb is the paper's LAMB: bias is corrected first, and the trust ratio is not bounded")
        norm = max_grad_norm or None
        super().__init__(params, lr, betas, eps, weight_decay, max_grad_norm=norm, **options)


class FusedLion(Lion):
    """Lion with DeepSpeed's defaults, which are Adam's."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        **options: Any,
    ) -> None:
        _refuse(self, not set_grad_none, "set_grad_none=False: call zero_grad(set_to_none=False) instead")
        super().__init__(params, lr, betas, weight_decay, **options)


class DeepSpeedCPULion(Lion):
    """The same, wherever the parameters are."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay, **_stored(fp32_optimizer_states, options))


class DeepSpeedCPUAdagrad(Adagrad):
    """Adagrad, wherever the parameters are."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        **options: Any,
    ) -> None:
        _refuse(self, amsgrad, "amsgrad=True: Adagrad has no such variant; leave it out")
        stored = _stored(fp32_optimizer_states, options)
        super().__init__(model_params, lr, weight_decay=weight_decay, eps=eps, **stored)
