"""Whether 16-bit weights without an fp32 master learn: an update below half a unit in their last place is lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepfast.optim.shards import local
from deepfast.optim.warned import warn

STEP = 10  # the one that is looked at
SAMPLE = 2**12  # about so many elements of each parameter


def watch(optimizer: torch.optim.Optimizer, advice: str) -> None:
    """Warns once, after the 10th step, if most updates of 16-bit weights have left the weights as they were."""
    watched = _Watched(advice)
    optimizer.register_step_pre_hook(watched.before)
    optimizer.register_step_post_hook(watched.after)


class _Watched:
    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._steps = 0
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []  # weights, what they were, whether they have a gradient

    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._steps += 1
        if self._steps != STEP or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        for group in optimizer.param_groups:
            for p in group["params"] if float(group["lr"]) else ():
                weight, grad = local(p).detach(), local(p.grad)
                narrow = weight.dtype in (torch.float16, torch.bfloat16) and type(weight) in (Tensor, nn.Parameter)
                if narrow and grad is not None and grad.layout == torch.strided and grad.shape == weight.shape:
                    part = _sample(weight)
                    self._taken.append((part, part.clone(), _sample(grad) != 0))

    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        taken, self._taken = self._taken, []
        if not taken:
            return
        found_inf = getattr(optimizer, "_found_inf", None)
        if found_inf is not None and found_inf > 0:
            self._steps -= 1  # a skipped step is none
            return
        meant = sum(int(moves.sum()) for _, _, moves in taken)
        lost = sum(int((moves & (now == was)).sum()) for now, was, moves in taken)
        if 2 * lost > meant:
            rate = max(float(group["lr"]) for group in optimizer.param_groups)
            warn(
                f"deepfast: {lost / meant:.0%} of the updates of 16-bit weights were rounded away in step {STEP} "
                f"(lr={rate:g}): {self._advice}"
            )


def _sample(t: Tensor) -> Tensor:
    """A view of some of the rows."""
    return t if t.dim() == 0 else t[:: max(1, min(t.shape[0], t.numel() // SAMPLE))]
