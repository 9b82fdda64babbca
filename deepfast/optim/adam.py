"""Adam, and Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from deepfast.optim.base import Optimizer
from deepfast.optim.hyper import Value, check_betas, check_lr, require
from deepfast.optim.options import Asked


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980), a drop-in for :class:`torch.optim.Adam`.

    Args:
        params: parameters or parameter groups, any floating dtype; groups may override every option below up to
            ``maximize``.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch. lr and betas may be one-element tensors.
        decoupled_weight_decay: True makes it AdamW.
        bias_correction: False takes the moments as they are, lr and sqrt(v) + eps: BERT's Adam. (A group and a
            checkpoint name it where it is not True, else they have torch's keys; one that does not leaves it be.)
        foreach, fused, capturable: accepted for compatibility; the step is always one fused pass.
        differentiable: must be False.
        **options: see :class:`deepfast.optim.Optimizer`.

    State per parameter, torch's keys: ``step`` (0-d fp32), ``exp_avg``, ``exp_avg_sq``, with amsgrad
    ``max_exp_avg_sq`` (parameter's shape; fp32 unless ``state_dtype`` asks otherwise, fp64 and complex parameters' of
    their type), and ``master`` for 16-bit ones (``master="split"``: int16, "fp32": fp32; in ``state_dict()`` fp32).

    Raises:
        ValueError: for a hyperparameter out of range, and for amsgrad with second moments in 8 bits.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        **options: Unpack[Asked],
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
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        if not bias_correction:  # torch has none, and a group that says nothing has torch's keys
            defaults["bias_correction"] = False
        super().__init__(params, defaults, **options)

    def _check(self, group: dict[str, Any]) -> None:
        check_lr(group)
        check_betas(group)
        require(0.0 <= group["eps"], f"Invalid epsilon value: {group['eps']}")
        require(0.0 <= group["weight_decay"], f"Invalid weight_decay value: {group['weight_decay']}")
        tensors = [isinstance(beta, Tensor) for beta in group["betas"]]
        require(all(tensors) or not any(tensors), "betas must be either both floats or both Tensors")
        if group["foreach"] and not group["capturable"]:
            for name, value in (("lr", group["lr"]), ("betas[0]", group["betas"][0])):
                unsupported = f"{name} as a Tensor is not supported for capturable=False and foreach=True"
                require(not isinstance(value, Tensor), unsupported)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        squares = [name for name in super()._moments(group) if "sq" in name]
        if len(squares) > 1 and "int8" in map(self._form, squares):
            raise ValueError(
                "deepfast: amsgrad with a second moment in 8 bits: its maximum would keep what rounding by chance adds "
                "(updates 5 to 10 % short): keep state_dtype={'exp_avg': 'int8'}"
            )
        return super()._moments(group)

    def _rule(self, group: dict[str, Any]) -> str:
        return "adam_amsgrad" if group["amsgrad"] else "adam"

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        decay = group["weight_decay"]
        decays = (decay, 0.0) if group["decoupled_weight_decay"] else (0.0, decay)
        return (group["lr"], *group["betas"], group["eps"], *decays, bool(group.get("bias_correction", True)))


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), a drop-in for :class:`torch.optim.AdamW`.

    :class:`Adam` with decoupled weight decay: p -= lr · weight_decay · p, beside the step instead of through it.
    """

    _not_loaded = (*Adam._not_loaded, "decoupled_weight_decay")  # torch's Adam says False in its checkpoints

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
        bias_correction: bool = True,
        **options: Unpack[Asked],
    ) -> None:
        given: dict[str, Any] = {**options}
        if not given.pop("decoupled_weight_decay", True):  # ``defaults`` has it: type(o)(params, **o.defaults)
            raise ValueError("deepfast: AdamW's weight decay is decoupled: use Adam")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            bias_correction=bias_correction,
            **given,
        )
