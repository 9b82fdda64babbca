"""Gradients that hold inf or NaN: whose they are; and steps that take them, where no loss scale skips them."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast.engine.resume import Resumable

log = logging.getLogger("deepfast")


def parameters(engine: Resumable) -> list[str]:
    """Names of those whose gradients hold inf or NaN, in the module's order: a pass over what this rank steps.

    Of a sharded engine each rank has seen a part: all call it.
    """
    grads = {name: part.mine.grad for name, part in zip(engine._names(), engine._parts(), strict=True)}
    order = dict.fromkeys(name for name, _ in engine.module.named_parameters() if name in grads) | grads
    held = {name: _values(grad) for name, grad in grads.items() if grad is not None and grad.numel()}
    bad = [~grad.isfinite().all() for grad in held.values()]
    found = {name for name, is_bad in zip(held, torch.stack(bad).tolist(), strict=True) if is_bad} if bad else set()
    if engine._units is not None or any(part.sharded for part in engine._parts()):
        of_all: list[Any] = [None] * engine.world_size
        dist.all_gather_object(of_all, found)
        found = set().union(*of_all)
    return [name for name in order if name in found]


def _values(grad: Tensor) -> Tensor:
    grad = getattr(grad, "_local_tensor", grad).detach()
    return grad.coalesce().values() if grad.is_sparse else grad


def first(names: list[str]) -> str:
    """For a message; nothing where nobody was found, as where gradients are zeroed in the step (``reset_grad``)."""
    return f", first in {shortened(names[0])!r}" if names else ""


def shortened(name: str, length: int = 60) -> str:
    """Its end, which tells more."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


class NonFiniteSteps:
    """Counts steps with inf or NaN in their gradients that nothing has skipped; says so at the 1st, 10th, 100th ...

    The norm tells it. On a GPU it is copied beside the work that follows, and looked at when it is there, in a later
    step: the host does not wait. Only names are worth a wait, since the gradients are soon gone.

    Args:
        name: say whose gradient it was.
    """

    def __init__(self, name: bool) -> None:
        self._name = name
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()  # step, its norm on the host, the event of its copy
        self._count = 0

    def heed(self, engine: Resumable, norm: Tensor | None) -> None:
        """After a step and before its gradients go; on all ranks alike."""
        step = engine.global_steps + 1
        if norm is None:
            return
        if norm.device.type == "cuda" and not self._name:
            on_host, there = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            there.record(torch.cuda.current_stream(norm.device))
            self._waiting.append((step, on_host, there))
            self._hear(wait=False)
        elif not math.isfinite(value := float(norm)):
            self._note(step, value, engine)

    def count(self) -> int:
        """So far, the steps that a GPU is still at included: waits for them."""
        self._hear(wait=True)
        return self._count

    def _hear(self, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0][2].query()):
            step, norm, there = self._waiting.popleft()
            there.synchronize()
            if not math.isfinite(value := float(norm)):
                self._note(step, value)

    def _note(self, step: int, norm: float, engine: Resumable | None = None) -> None:
        self._count += 1
        if self._count != 10 ** (len(str(self._count)) - 1):
            return
        whose = first(parameters(engine)) if engine is not None and self._name else ""
        if not dist.is_initialized() or dist.get_rank() == 0:
            log.warning(
                "step %d: the gradients' norm is %s%s; without loss scaling that reaches the weights (such steps so "
                "far: %d)", step, norm, whose, self._count,
            )  # fmt: skip
