"""In what type weights are kept, in what type forward and backward compute, and how the loss is scaled for it.

On a CPU, torch multiplies fp16 matrices up to several hundred times slower than fp32 ones. There the weights and
gradients are fp16 all the same (they round, they overflow, the loss scale matters), but a forward pass sees fp32
copies of the weights. Autograd casts each weight's gradient back to fp16 once, after summing it in fp32.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from deepfast import reference
from deepfast.engine.config import Config, named
from deepfast.errors import ConfigError
from deepfast.scaler import LossScaler

log = logging.getLogger("deepfast")

_HIGHEST_POWER = 24  # no scale grows beyond this power of 2
_LOWEST = 2.0**-24  # at which every finite loss of fp16 has been tried


class Precision:
    """Casts a module to ``dtype`` and calls it in the type that the device computes fast in.

    Args:
        module: cast in place; its buffers stay as they are where the arithmetic is fp32.
        dtype: float32, float16 or bfloat16.
        device: where the module is moved.
        cast_inputs: cast floating-point inputs to the type that is computed in.

    Attributes:
        originals: the values of fp32 parameters that were cast to 16 bits, for whoever makes masters of them.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, *, cast_inputs: bool = True
    ) -> None:
        self.module = module
        self.dtype = dtype
        self.compute_dtype = torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype
        self.cast_inputs = cast_inputs
        self.originals: dict[Tensor, Tensor] = {}
        for name, p in module.named_parameters():
            if p.is_complex():
                raise ConfigError(
                    f"the parameter {name!r} is {p.dtype}, and cast to {dtype} it would lose its imaginary part: keep "
                    "it as a real one (torch.view_as_real)"
                )
        module.to(device)
        for p in module.parameters():
            if p.dtype == torch.float32 != dtype:
                self.originals[p] = p.data
                p.data = torch.empty_like(p.data, dtype=dtype).copy_(reference.round_master(p.data, dtype))
            elif p.is_floating_point():
                p.data = p.data.to(dtype)
        if self.compute_dtype == dtype:
            module.to(dtype)
            return
        log.info("fp16 on a CPU: weights and gradients are fp16, forward and backward compute in fp32")

    @classmethod
    def of(cls, config: Config, module: nn.Module, device: torch.device) -> Precision:
        """What the configuration says."""
        fp16, bf16 = config.fp16, config.bf16
        dtype = torch.float16 if fp16 and fp16.enabled else torch.bfloat16 if bf16 and bf16.enabled else torch.float32
        auto_cast = fp16 is None or fp16.auto_cast
        return cls(module, dtype, device, cast_inputs=dtype != torch.float32 and auto_cast)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.cast_inputs:
            inputs, kwargs = self._cast(inputs), self._cast(kwargs)
        if self.compute_dtype == self.dtype:
            return self.module(*inputs, **kwargs)
        if any(getattr(m, "gradient_checkpointing", False) for m in self.module.modules()):  # transformers' flag
            raise RuntimeError(
                "fp16 on a CPU computes with fp32 copies of the weights, which recomputed activations would not see: "
                "turn gradient checkpointing off, or use bf16"
            )
        wide = {name: p.to(self.compute_dtype) for name, p in self.module.named_parameters() if p.dtype == self.dtype}
        return torch.func.functional_call(self.module, wide, inputs, kwargs)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.compute_dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {k: self._cast(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(map(self._cast, value))
        return value


class _Checker(LossScaler):
    """Skips steps whose gradients are not finite. Its scale of 1 is no state: nobody shall go on with it under fp16."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def loss_scaler(config: Config, device: torch.device) -> LossScaler:
    """Static or dynamic as configured under fp16; of 1 under bf16, to skip steps; else one that does nothing."""
    scale, fp16, bf16 = config.train_loss_scale, config.fp16, config.bf16
    if fp16 is None or not fp16.enabled:
        if scale:
            log.info("train_loss_scale=%g has no effect without fp16", scale)
        checked = bf16 is not None and bf16.enabled and bf16.check_grad_overflow
        return _Checker(device, init_scale=1.0, dynamic=False) if checked else LossScaler(device, enabled=False)
    if scale:
        return LossScaler(device, init_scale=scale, dynamic=False)
    lowest = fp16.min_loss_scale or _LOWEST
    if fp16.initial_scale_power > _HIGHEST_POWER:
        log.info("fp16.initial_scale_power=%s: the scale starts at 2**24", named.brief(fp16.initial_scale_power))
    return LossScaler(
        device,
        init_scale=max(2.0 ** min(fp16.initial_scale_power, _HIGHEST_POWER), lowest),
        growth_interval=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_scale=lowest,
    )
