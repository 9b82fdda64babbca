"""Gradient release: each parameter is stepped as soon as its gradient is there, which then goes (arXiv:2306.09782)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import graphs, reference
from deepfast.optim.decide import decide
from deepfast.optim.launch import Launch

if TYPE_CHECKING:
    from deepfast.optim.base import Optimizer

_WHY_NOT = {
    "clipping": "max_grad_norm clips by the norm of all gradients, which is known only when backward has ended",
    "ranks": "torch.distributed runs with several ranks, whose gradients are added up only after a parameter's own is "
    "there",
    "parts": "an engine has cut its parameters into parts",
    "scaler": "a loss scaler decides whether a step is skipped when all gradients are known: train in bf16 or fp32",
    "twice": "a second backward has reached a parameter before step(): gradients cannot be accumulated. (step() after "
    "each backward only says that the step has ended.)",
}


def step_in_backward(optimizer: Optimizer) -> InBackward:
    """From now on ``optimizer`` steps each parameter during backward, and its gradient is released at once.

    No more than one gradient is held at a time. The loop stays as it is: ``optimizer.step()`` only says that a step has
    ended, and steps what has been unfrozen or added to the groups since it last did: in backward, too, from then on.
    Learning rates are those of the moment when a gradient is there.

    What needs all gradients before the first step is an error: clipping by the global norm, loss scaling, gradients
    that ranks add up (DDP, FSDP, the engine), accumulation over several backward passes.

    Args:
        optimizer: one of deepfast's.

    Returns:
        A handle: its ``remove()`` makes it an ordinary optimizer again.

    Raises:
        TypeError: for an optimizer of another library.
        RuntimeError: for what cannot work; in part only when it happens.
    """
    if not hasattr(optimizer, "_deal"):
        raise TypeError(f"deepfast: step_in_backward() takes an optimizer of deepfast, not {type(optimizer).__name__}")
    if optimizer._in_backward is not None:
        raise RuntimeError("deepfast: this optimizer steps in backward already")
    return InBackward(optimizer)


class InBackward:
    """Made by :func:`step_in_backward`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._check(optimizer)
        self._launches: dict[Tensor, tuple[Any, Launch]] = {}
        self._stepped: set[Tensor] = set()
        # A parameter does not show its hooks to Python's garbage collector: one that held on to us, and we to the
        # parameter, would keep the model for ever.
        step = weakref.WeakMethod(self._step)
        self._hook = lambda p: (known := step()) and known(p)
        self._hooks: dict[Tensor, Any] = {}
        self._take(optimizer)
        optimizer._in_backward = self

    def remove(self) -> None:
        """Gradients stay from now on, and ``step()`` steps."""
        for hook in self._hooks.values():
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            optimizer._in_backward = None

    def end(self, closure: Callable[[], Any] | None) -> Any:
        """What ``optimizer.step(closure)`` is now."""
        optimizer = self._optimizer()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check(optimizer)
        for p in self._take(optimizer):
            self._step(p)
        self._stepped.clear()
        return loss

    def refuse_scaler(self) -> NoReturn:
        """What a scaler that is to step the optimizer is told."""
        _refuse("scaler")

    def _take(self, optimizer: Any) -> list[Tensor]:
        """Those that are to be trained and had no hook: all, and later what was unfrozen or added since."""
        new = [p for p in optimizer._params() if p.requires_grad and p not in self._hooks]
        self._hooks.update((p, p.register_post_accumulate_grad_hook(self._hook)) for p in new)
        return new

    def _check(self, optimizer: Any) -> None:
        handed = optimizer._shared
        scaled = handed.get("grad_scale") is not None or handed.get("found_inf") is not None
        for found, why in (
            (optimizer.max_grad_norm is not None, "clipping"),
            (dist.is_initialized() and dist.get_world_size() > 1, "ranks"),
            (optimizer._parts is not None, "parts"),
            (scaled or handed.get("_check_finite"), "scaler"),
        ):
            if found:
                _refuse(why)

    @torch.no_grad()
    def _step(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        if p in self._stepped:
            _refuse("twice")
        self._check(optimizer)
        self._stepped.add(p)
        launch = self._launch(optimizer, p)
        if graphs.capturing(launch.device):
            optimizer._check_capture(launch.device)
        hyper, lrs = optimizer._hyper_table(launch.device)
        launch.step(hyper, lrs, decide(optimizer, [launch])[launch.device])
        p.grad = None

    def _launch(self, optimizer: Any, p: Tensor) -> Launch:
        """That of one parameter alone, its gradient found."""
        seen, launch = self._launches.get(p, (None, None))
        if launch is not None and seen == optimizer._seen([]) and launch.gather(reference.KEPT):
            return launch
        member = next((m for m in optimizer._members() if m.p is p), None)
        if member is None:
            raise RuntimeError(
                f"deepfast: a parameter of shape {tuple(p.shape)} is in the optimizer's groups no more: call remove() "
                "of the handle, and step_in_backward() again"
            )
        (launch,) = optimizer._deal([member], {})
        if not launch.gather(reference.KEPT):
            raise RuntimeError("deepfast: a parameter changed while the step looked at it")
        self._launches[p] = optimizer._seen([]), launch
        return launch


def _refuse(why: str) -> NoReturn:
    raise RuntimeError(f"deepfast: step_in_backward(): {_WHY_NOT[why]}")
