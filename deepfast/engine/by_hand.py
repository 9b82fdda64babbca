"""Gradients read and written by hand, where an engine keeps them: DeepSpeed's ``safe_get_full_grad`` and its like.

With micro-batches, ranks or a loss scale, ``p.grad`` is not what the step takes: clipping it would do nothing, or
something else. There a stand-in lies in ``p.grad`` between backward passes; whoever uses it gets an error.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from deepfast.optim.shards import copy_into, is_sharded, local

HOW = (
    'p.grad: the engine keeps this gradient (summed, scaled): clip with "gradient_clipping", read it with '
    "safe_get_full_grad(p), write it with safe_set_full_grad(p, value) of deepfast.deepspeed.utils"
)


class StandIn(Tensor):
    """In the place of a gradient that lies elsewhere: has its shape, and no elements."""

    @staticmethod
    def __new__(cls, p: Tensor) -> StandIn:
        return torch.Tensor._make_wrapper_subclass(cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn({HOW!r})"

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(HOW)


def cover(p: Tensor, made: dict[Tensor, Tensor]) -> None:
    """Puts a stand-in into ``p.grad``; one for each parameter is kept in ``made``."""
    p.grad = None
    if type(local(p)) not in (Tensor, torch.nn.Parameter):  # what has arithmetic of its own takes only its own kind
        return
    known = made.get(p)
    if known is None or (known.shape, known.dtype, known.device) != (p.shape, p.dtype, p.device):
        known = made[p] = StandIn(p) if not is_sharded(p) else _around(p)
    p.grad = known


def _around(p: Any) -> Tensor:
    """A DTensor that lies as ``p`` does, each rank's part a stand-in."""
    known = p.detach()
    known._local_tensor = StandIn(local(p))
    return known


def is_stand_in(grad: Tensor) -> bool:
    return isinstance(local(grad), StandIn)


_kept = WeakTensorKeyDictionary()  # parameter -> whose gradients it is among


def note(gradients: Any, params: Any) -> None:
    """The engine's that steps ``params``."""
    for p in params:
        _kept[p] = weakref.ref(gradients)


def _keeper(p: Tensor) -> Any:
    found = _kept.get(p)
    return None if found is None else found()


@torch.no_grad()
def safe_get_full_grad(p: Tensor) -> Tensor | None:
    """The gradient that the next step takes for ``p``: the mean over micro-batches and ranks, unscaled, not clipped.

    After the step's last backward pass; all ranks call it.

    Returns:
        float32, a copy of the parameter's shape; None where it has none. ``p.grad`` if no engine steps ``p``.
    """
    keeper = _keeper(p)
    if keeper is None:
        return p.grad
    keeper.fold()
    if not keeper.count:
        return None
    with keeper.whole(p) as (part, grad, divisor):
        if grad is None:
            return None
        if not part.sharded:
            mean = grad.float() / divisor
            return mean.full_tensor() if is_sharded(mean) else mean
        flat = torch.zeros_like(part.whole, dtype=torch.float32)
        flat.as_strided((flat.numel(),), (1,))[part.begin : part.end] = grad / divisor
        dist.all_reduce(flat)
        return flat


@torch.no_grad()
def safe_set_full_grad(p: Tensor, value: Tensor) -> None:
    """Makes ``value`` the gradient that the next step takes for ``p``; clipping, if configured, comes after it.

    Args:
        value: unscaled, of the parameter's shape; the same on all ranks, which all call it.

    Raises:
        ValueError: for another shape.
        RuntimeError: where ``p`` has no gradient in this step.
    """
    if value.shape != p.shape:
        raise ValueError(f"safe_set_full_grad(): a value of shape {tuple(value.shape)}, for one of {tuple(p.shape)}")
    keeper = _keeper(p)
    if keeper is None:
        p.grad = value.to(p)
        return
    keeper.fold()
    if not keeper.count:
        raise RuntimeError("safe_set_full_grad(): there was no backward() since the last step")
    with keeper.whole(p) as (part, grad, divisor):
        if grad is None:
            raise RuntimeError("safe_set_full_grad(): the parameter has no gradient in this step")
        copy_into(grad, part.of(value.to(p.device)) * divisor)
        keeper.rewritten()
