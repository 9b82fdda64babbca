"""Loss scaling, static and dynamic, whose state never leaves the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from deepfast import ops
from deepfast.optim.base import Optimizer
from deepfast.optim.reach import Reach
from deepfast.optim.shards import is_flat_shard, local, refuse_flat_shards

T = TypeVar("T", Tensor, list[Tensor], tuple[Tensor, ...])


class LossScaler:
    """Keeps 16-bit gradients in range; the methods are those of :class:`torch.amp.GradScaler`.

    A step whose gradients hold an inf or NaN is skipped. What happens to the scale, at ``update``:

    ================  =====================================  =======================  ==============
    this step         scale                                  growth tracker           hysteresis left
    ================  =====================================  =======================  ==============
    overflow          unchanged while hysteresis was left;   0                        one less
                      else max(scale · backoff, min_scale)                            (at least 0)
    clean             unchanged                              one more                 unchanged [1]_
    clean, tracker    min(scale · growth, max_scale)         0                        refilled
    at the interval
    ================  =====================================  =======================  ==============

    .. [1] refilled with ``consecutive_hysteresis``.

    Hysteresis counts down first: with ``hysteresis=1`` the first overflow backs off, with 2 the second, and once it
    is used up every further one. A static scale (``dynamic=False``) stays what it is, and any positive value is legal.

    A deepfast optimizer unscales, checks and skips inside its step, without a host sync; the step is called for an
    overflow, too, and ``found_inf`` tells. It does not write the gradients: after ``step`` they are still multiplied by
    the scale (``optimizer.grad_norm`` is not), unless ``unscale_`` came first. For any other optimizer the gradients
    are unscaled in a pass of their own, as GradScaler does it, and the host waits once for the verdict.

    Args:
        device: where the state lies; None: where the first loss or optimizer is.
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in torch. Where "cuda" is asked for and
            not available the scaler is disabled, with a warning.
        hysteresis: overflows until the scale backs off.
        consecutive_hysteresis: every clean step refills the hysteresis.
        min_scale, max_scale: bounds of a dynamic scale; max_scale None: 2^24, or a larger init_scale.
        dynamic: False for a constant scale.

    Raises:
        ValueError: for factors, bounds or counts that make no sense.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
        max_scale: float | None = None,
        dynamic: bool = True,
    ) -> None:
        numbers = {"init_scale": init_scale, "growth_factor": growth_factor, "backoff_factor": backoff_factor}
        numbers |= {"growth_interval": growth_interval, "hysteresis": hysteresis, "min_scale": min_scale}
        for name, number in (*numbers.items(), ("max_scale", 1.0 if max_scale is None else max_scale)):
            _check_number(name, number)
        for name, flag in (("enabled", enabled), ("dynamic", dynamic)):
            if flag not in (True, False):
                raise TypeError(f"deepfast: {name} must be True or False, got {flag!r}")
        if not (device is None or isinstance(device, (str, torch.device))):
            raise TypeError(f"deepfast: device must be a torch.device or its name, got {device!r}")
        if not 0.0 < init_scale < float("inf"):
            raise ValueError(f"init_scale must be positive and finite, got {init_scale}")
        if max_scale is None:
            max_scale = max(2.0**24, init_scale)
        if dynamic:
            if not growth_factor > 1.0:
                raise ValueError(f"growth_factor must be above 1, got {growth_factor}")
            if not 0.0 < backoff_factor < 1.0:
                raise ValueError(f"backoff_factor must lie between 0 and 1, got {backoff_factor}")
            if not 0.0 < min_scale <= init_scale <= max_scale:
                raise ValueError(
                    f"init_scale {init_scale} must lie between min_scale {min_scale} and max_scale {max_scale}, "
                    "both positive (dynamic=False takes any positive scale)"
                )
        if not 1 <= growth_interval < 2**24 or not 1 <= hysteresis < 2**24:
            raise ValueError(
                f"growth_interval {growth_interval} and hysteresis {hysteresis} must lie between 1 and 2^24"
            )
        if enabled and device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            warnings.warn("deepfast.LossScaler is enabled, but CUDA is not available. Disabling.", stacklevel=2)
            enabled = False
        self._enabled = enabled
        self._init_scale = float(init_scale)
        self._growth_factor = float(growth_factor)
        self._backoff_factor = float(backoff_factor)
        self._growth_interval = int(growth_interval)
        self._hysteresis = int(hysteresis)
        self._consecutive_hysteresis = bool(consecutive_hysteresis)
        self._min_scale = float(min_scale)
        self._max_scale = float(max_scale)
        self._dynamic = bool(dynamic)
        # fp32[4]: scale, growth tracker, hysteresis left, skipped steps (csrc/math/scaler.h)
        self._values = [self._init_scale, 0.0, float(hysteresis), 0.0]
        self._state: Tensor | None = None
        self._used: Tensor | None = None  # the scale that the last backward used
        self._unscaled: dict[int, Tensor] = {}  # _key(optimizer) -> found_inf, since the last update
        self._stepped: dict[int, Tensor] = {}  # likewise, of optimizers that have stepped
        self._reached: dict[int, Reach] = {}  # likewise, the ranks that know of it
        if enabled and device is not None:
            self._place(torch.device(device))

    def _place(self, device: torch.device) -> Tensor:
        if self._state is None:
            self._state = torch.tensor(self._values, dtype=torch.float32, device=device)
        return self._state

    def is_enabled(self) -> bool:
        return self._enabled

    def is_dynamic(self) -> bool:
        return self._dynamic

    @overload
    def scale(self, outputs: T) -> T: ...
    @overload
    def scale(self, outputs: Iterable[Tensor]) -> Iterable[Tensor]: ...
    def scale(self, outputs: Any) -> Any:
        """``outputs`` (a tensor, or any nesting of iterables of tensors) times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            state = self._place(outputs.device)
            self._used = state[0].clone()  # update() must not change what this backward's step divides by
            return outputs * self._used.to(outputs.device)
        if isinstance(outputs, Iterable) and not isinstance(outputs, str):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled
        raise ValueError("outputs must be a tensor or an iterable of tensors")

    def _scale_used(self, device: torch.device) -> Tensor:
        state = self._place(device)
        return self._used if self._used is not None else state[0]

    def scale_of_this_step(self) -> Tensor | None:
        """What the gradients since the last ``update`` were multiplied by, fp32 []; None if disabled."""
        if not self._enabled or self._state is None:
            return None
        return self._used if self._used is not None else self._state[0].clone()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients of ``optimizer`` by the scale in place, to look at them or change them before ``step``.

        Raises:
            RuntimeError: called twice or after ``step``; for fp16 gradients, which would underflow; for FSDP1's shards.
        """
        if not self._enabled:
            return
        _check_optimizer(optimizer)
        if _key(optimizer) in self._stepped:
            raise RuntimeError("unscale_() is being called after step().")
        if _key(optimizer) in self._unscaled:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        grads = _grads_of(optimizer)
        if any(g.dtype == torch.float16 for g in grads):
            raise RuntimeError(
                "unscaling fp16 gradients in place would let them underflow: step() with a deepfast optimizer itself, "
                "without unscale_(), unscales inside its step, and clips there, too (max_grad_norm=)"
            )
        if any(is_flat_shard(p) for group in optimizer.param_groups for p in group["params"]):
            refuse_flat_shards("overflow")
        reach = self._reached[_key(optimizer)] = Reach.of(optimizer)
        self._unscaled[_key(optimizer)] = reach.sum_(self._unscale(grads, _home(optimizer)))

    def _unscale(self, grads: list[Tensor], home: torch.device) -> Tensor:
        """Divides what this rank has of ``grads`` in place; returns whether it overflowed, on ``home``."""
        grads = [g._values() if g.is_sparse else g for g in map(local, grads)]
        inverse = self._scale_used(home).double().reciprocal().float()
        found = torch.zeros((), dtype=torch.float32, device=home)
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for g in grads:
            by_kind.setdefault((g.device, g.dtype), []).append(g)
        for (device, _), some in by_kind.items():
            found_here = torch.zeros((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(some, found_here, inverse.to(device))
            found = torch.maximum(found, found_here.to(found.device))
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """``optimizer.step(*args, **kwargs)`` on unscaled gradients, or nothing but the gradient reset on overflow.

        Raises:
            RuntimeError: called twice since the last ``update``; with a closure; with a wrapper of a deepfast optimizer
                whose step does not reach it; for FSDP1's shards.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        _check_optimizer(optimizer)
        if any(closure is not None for closure in (*args, kwargs.get("closure"))):
            raise RuntimeError("a closure cannot be used while loss scaling is enabled")
        if _key(optimizer) in self._stepped:
            raise RuntimeError("step() has already been called since the last update().")
        released = getattr(optimizer, "_in_backward", None)
        if released is not None:
            released.refuse_scaler()
        if not _grads_of(optimizer) and not Reach.of(optimizer).groups:
            raise RuntimeError("No inf checks were recorded for this optimizer: none of its parameters has a gradient.")
        if isinstance(optimizer, Optimizer):
            result, found = self._step_inside(optimizer, self._unscaled.get(_key(optimizer)), *args, **kwargs)
        else:
            if _key(optimizer) not in self._unscaled:
                self.unscale_(optimizer)
            found = self._unscaled[_key(optimizer)]
            result = None if found.item() else optimizer.step(*args, **kwargs)
        # Only now: after an exception in the optimizer's step, the same step can be tried again.
        self._unscaled.pop(_key(optimizer), None)
        self._stepped[_key(optimizer)] = found
        self._reached[_key(optimizer)] = getattr(optimizer, "_reach", None) or Reach.of(optimizer)
        return result

    def _step_inside(self, optimizer: Optimizer, unscaled: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The optimizer unscales, checks and skips in its own pass. Returns what it returned, and found_inf."""
        home = _home(optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # the engine's, or the user's as with GradScaler
        if unscaled is None:
            scale = self._scale_used(home) if scale is None else self._scale_used(home) * scale
        with optimizer._scaled(scale, found_inf=unscaled, check_finite=unscaled is None):
            result = optimizer.step(*args, **kwargs)
        decided = optimizer._found_inf
        return result, torch.zeros((), dtype=torch.float32, device=home) if decided is None else decided

    def found_inf(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """> 0 if the step of ``optimizer`` since the last update was skipped; None if there was none."""
        return self._stepped.get(_key(optimizer))

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Moves the scale on after all optimizers have stepped, or sets it to ``new_scale``.

        Raises:
            RuntimeError: if no optimizer has stepped since the last update.
        """
        if not self._enabled:
            return
        if new_scale is not None:
            _check_number("new_scale", new_scale)
            if isinstance(new_scale, Tensor):
                value = new_scale.detach().reshape(())
            elif 0.0 < new_scale < float("inf"):
                value = torch.tensor(float(new_scale), dtype=torch.float32, device="cpu")
            else:
                raise ValueError(f"new_scale must be positive and finite, got {new_scale}")
            self._place(value.device)[0].copy_(value)
        else:
            found = [*self._unscaled.values(), *self._stepped.values()]
            if not found:
                raise RuntimeError("No inf checks were recorded prior to update().")
            state = self._place(found[0].device)
            wider = Reach.of_all(list(self._reached.values()))
            if wider.groups:  # optimizers that not all ranks share, and one scale
                found = [wider.sum_(torch.stack([(f > 0).float().to(state.device) for f in found]).amax())]
            ops.select(ops.forced(), state.device).scaler_update_(
                state,
                [f.to(state.device) for f in found],
                self._growth_factor,
                self._backoff_factor,
                self._growth_interval,
                self._hysteresis,
                self._consecutive_hysteresis,
                self._dynamic,
                self._min_scale,
                self._max_scale,
            )
        if new_scale is None or self._stepped:  # a backward that no step has followed keeps its scale
            self._used = None
        for kept in (self._unscaled, self._stepped, self._reached):
            kept.clear()

    def _read(self) -> list[float]:
        return self._values if self._state is None else self._state.tolist()

    def get_scale(self) -> float:
        """The scale, on the host (waits for the device); 1 if disabled."""
        return self._read()[0] if self._enabled else 1.0

    @property
    def cur_scale(self) -> float:
        """``get_scale()``, under DeepSpeed's name."""
        return self.get_scale()

    loss_scale = cur_scale  # likewise

    @property
    def skipped_steps(self) -> int:
        """How many updates saw an overflow (waits for the device)."""
        return int(self._read()[3])

    def get_min_scale(self) -> float:
        return self._min_scale

    def get_growth_factor(self) -> float:
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        _check_number("growth_factor", new_factor)
        self._growth_factor = float(new_factor)

    def get_backoff_factor(self) -> float:
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        _check_number("backoff_factor", new_factor)
        self._backoff_factor = float(new_factor)

    def get_growth_interval(self) -> int:
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        _check_number("growth_interval", new_interval)
        self._growth_interval = int(new_interval)

    def state_dict(self) -> dict[str, Any]:
        """GradScaler's keys and ours; empty if disabled."""
        if not self._enabled:
            return {}
        scale, tracker, left, skipped = self._read()
        return {
            "scale": scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": int(tracker),
            "hysteresis_left": int(left),
            "skipped_steps": int(skipped),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes our state_dict or GradScaler's, whose missing keys leave hysteresis full and no steps skipped."""
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError("The source state dict is empty, possibly because it was saved from a disabled scaler.")
        missing = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"} - state_dict.keys()
        if missing:
            raise ValueError(f"deepfast: no {min(missing)!r} in the state: it is not that of a loss scaler")
        self._growth_factor = float(state_dict["growth_factor"])
        self._backoff_factor = float(state_dict["backoff_factor"])
        self._growth_interval = int(state_dict["growth_interval"])
        self._values = [
            float(state_dict["scale"]),
            float(state_dict["_growth_tracker"]),
            float(state_dict.get("hysteresis_left", self._hysteresis)),
            float(state_dict.get("skipped_steps", 0)),
        ]
        self._used = None
        if self._state is not None:
            self._state.copy_(torch.tensor(self._values))

    def __getstate__(self) -> dict[str, Any]:
        if self._unscaled or self._stepped:
            raise RuntimeError("A LossScaler can only be pickled at the beginning of an iteration or after update().")
        return {**self.__dict__, "_values": self._read(), "_state": None, "_used": None, "_reached": {}}


def _check_number(name: str, value: Any) -> None:
    if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.numel() != 1):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"deepfast: {name} must be a number, got {what}")


def _check_optimizer(optimizer: Any) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"deepfast: the loss scaler steps an optimizer, not {type(optimizer).__name__}")


def _key(optimizer: torch.optim.Optimizer) -> int:
    """The same for a deepfast optimizer and for a wrapper that has its class."""
    return id(getattr(optimizer, "_shared", optimizer))


def _home(optimizer: torch.optim.Optimizer) -> torch.device:
    """Where its first gradient is, or without any its first parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return next((p.grad.device for p in params if p.grad is not None), params[0].device)


def _grads_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
