"""In what type weights are kept, in what type forward and backward compute, and how the loss is scaled for it.

On a CPU, torch multiplies fp16 matrices up to several hundred times slower than fp32 ones. There the weights and
gradients are fp16 all the same (they round, they overflow, the loss scale matters), but a forward pass sees fp32
copies of the weights. Autograd casts each weight's gradient back to fp16 once, after summing it in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
        in_parts: the weights, what is computed with them and where they are, is somebody else's to say (stage 3).
        cast_inputs: cast all floating-point inputs to the type that is computed in. Without it they are left as they
            are, labels and positions among them, and each layer with weights is given what fits these.

    Attributes:
        originals: the values of fp32 parameters that were cast to 16 bits, for whoever makes masters of them.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_parts: bool = False,
        cast_inputs: bool = False,
    ) -> None:
        self.module = module
        self.dtype = dtype
        self.compute_dtype = torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype
        self.cast_inputs = cast_inputs
        self._in_parts = in_parts
        self.originals: dict[Tensor, Tensor] = {}
        for name, p in module.named_parameters():
            if p.is_complex():
                raise ConfigError(
                    f"the parameter {name!r} is {p.dtype}, and cast to {dtype} it would lose its imaginary part: keep "
                    "it as a real one (torch.view_as_real)"
                )
        if in_parts:
            for b in module.buffers():
                b.data = b.data.to(device, self.compute_dtype if b.is_floating_point() else None)
        else:
            self._cast_weights(device)
        if dtype != torch.float32:
            for layer in _layers(module):
                self._prepare(layer)
        if self.compute_dtype != dtype:
            log.info("fp16 on a CPU: weights and gradients are fp16, forward and backward compute in fp32")

    def _cast_weights(self, device: torch.device) -> None:
        module, dtype = self.module, self.dtype
        module.to(device)
        for p in module.parameters():
            if p.dtype == torch.float32 != dtype:
                self.originals[p] = p.data
                p.data = torch.empty_like(p.data, dtype=dtype).copy_(reference.round_master(p.data, dtype))
            elif p.is_floating_point():
                p.data = p.data.to(dtype)
        if self.compute_dtype == dtype:
            module.to(dtype)

    def _prepare(self, layer: nn.Module) -> None:
        hooks = layer._forward_pre_hooks.values()  # of an engine before, perhaps
        if self.compute_dtype != self.dtype and not self._in_parts and _widen not in hooks:
            layer.register_forward_pre_hook(_widen)
            layer.register_forward_hook(_narrow, always_call=True)
        if _fit not in hooks:
            layer.register_forward_pre_hook(_fit, with_kwargs=True)

    @classmethod
    def of(cls, config: Config, module: nn.Module, device: torch.device, in_parts: bool = False) -> Precision:
        """What the configuration says."""
        fp16, bf16 = config.fp16, config.bf16
        dtype = torch.float16 if fp16 and fp16.enabled else torch.bfloat16 if bf16 and bf16.enabled else torch.float32
        auto_cast = dtype == torch.float16 and fp16 is not None and fp16.auto_cast
        return cls(module, dtype, device, in_parts=in_parts, cast_inputs=auto_cast)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.cast_inputs:
            inputs, kwargs = _cast(inputs, self.compute_dtype), _cast(kwargs, self.compute_dtype)
        if self.compute_dtype == self.dtype or self._in_parts:
            return self.module(*inputs, **kwargs)
        wide = {name: p.to(self.compute_dtype) for name, p in self.module.named_parameters() if p.dtype == self.dtype}
        return torch.func.functional_call(self.module, wide, inputs, kwargs)


_HOLDERS = (nn.ParameterList, nn.ParameterDict)


def _layers(module: nn.Module) -> list[nn.Module]:
    """What computes with weights: of torch.nn, whatever holds some; else what holds some and no other layers."""
    return [
        m
        for m in module.modules()
        if not isinstance(m, _HOLDERS)
        and _own(m)
        and (type(m).__module__.startswith("torch.nn") or all(isinstance(child, _HOLDERS) for child in m.children()))
    ]


def _own(layer: nn.Module) -> list[Tensor]:
    """The floating-point weights that a layer holds itself, or in a list."""
    holders = (layer, *(child for child in layer.children() if isinstance(child, _HOLDERS)))
    return [p for holder in holders for p in holder.parameters(recurse=False) if p.is_floating_point()]


def _fit(layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a layer's forward pass: its floating-point inputs, in the type that its weights have now."""
    dtype = next((p.dtype for p in layer._parameters.values() if p is not None and p.is_floating_point()), None)
    if dtype is None:
        dtype = next((p.dtype for p in _own(layer)), None)
    if dtype is None or (not kwargs and len(inputs) == 1 and getattr(inputs[0], "dtype", None) == dtype):
        return None  # they fit, as most do
    return _cast(inputs, dtype), _cast(kwargs, dtype)


def _widen(layer: nn.Module, _: Any) -> None:
    """Before the forward pass of a layer that runs outside the engine's (activations are recomputed): fp32 copies."""
    narrow = {name: p for name, p in layer._parameters.items() if p is not None and p.dtype == torch.float16}
    if narrow:
        layer.__dict__["_narrow"] = narrow
        layer._parameters.update({name: p.float() for name, p in narrow.items()})  # type: ignore[misc]
        _flatten(layer)


def _narrow(layer: nn.Module, *_: Any) -> None:
    """After it: the weights themselves."""
    narrow = layer.__dict__.pop("_narrow", None)
    if narrow:
        layer._parameters.update(narrow)
        _flatten(layer)


def _flatten(layer: nn.Module) -> None:
    if isinstance(layer, nn.RNNBase):  # keeps its weights in a list, too
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, in whatever holds them, in another type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        cast = {k: _cast(v, dtype) for k, v in value.items()}
        return cast if type(value) is dict else type(value)(cast)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(v, dtype) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
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
