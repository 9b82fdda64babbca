"""Hyperparameters: what torch's optimizers accept, in torch's words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Value = float | Tensor

_NUMBERS = ("lr", "lr_decay", "eps", "weight_decay", "momentum", "dampening", "initial_accumulator_value")
_PAIRS = ("betas", "phi")


def require(condition: bool | Tensor, message: str) -> None:
    """Raises ValueError, of hyperparameters with torch's words."""
    if not condition:
        raise ValueError(message)


def check_numbers(group: dict[str, Any]) -> None:
    """Raises TypeError for a hyperparameter that is no number, before it is compared with one."""
    for name in _PAIRS:
        if isinstance(group.get(name, ()), (str, bytes)) or not hasattr(group.get(name, ()), "__len__"):
            raise TypeError(f"deepfast: {name} must be a pair of numbers, got {group[name]!r}")
    numbers = [(name, group[name]) for name in _NUMBERS if name in group]
    pairs = [(f"{name}[{i}]", value) for name in _PAIRS for i, value in enumerate(group.get(name, ()))]
    for name, value in (*numbers, *pairs):
        if not hasattr(value, "__float__"):
            raise TypeError(f"deepfast: {name} must be a number, got {value!r} ({type(value).__name__})")


def check_lr(group: dict[str, Any]) -> None:
    lr = group["lr"]
    require(not isinstance(lr, Tensor) or lr.numel() == 1, "Tensor lr must be 1-element")
    require(0.0 <= lr, f"Invalid learning rate: {lr}")


def check_betas(group: dict[str, Any]) -> None:
    require(len(group["betas"]) == 2, f"Invalid betas: {group['betas']}, there must be two")
    for i, beta in enumerate(group["betas"]):
        require(not isinstance(beta, Tensor) or beta.numel() == 1, f"Tensor betas[{i}] must be 1-element")
        require(0.0 <= beta < 1.0, f"Invalid beta parameter at index {i}: {beta}")


def check_flags(group: dict[str, Any]) -> None:
    """What torch's optimizers take beside hyperparameters: how a step is done."""
    if group.get("differentiable"):
        raise ValueError("deepfast: differentiable=True is not supported: the step happens in place")
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def is_read_on(device: torch.device, lr: Tensor) -> bool:
    """Whether the kernels on ``device`` read ``lr`` for themselves, without the host's waiting for it."""
    return lr.device == device and lr.dtype in (torch.float32, torch.float64)
