"""Learning rate over time: DeepSpeed's three schedules as functions of the number of steps that were applied."""

from __future__ import annotations

import functools
import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from deepfast.config import Config, SchedulerSection
from deepfast.errors import ConfigError


def warmup(step: int, steps: int, kind: str) -> float:
    """Share of the peak after ``step`` of ``steps`` warm-up steps."""
    if step >= steps:
        return 1.0
    return step / steps if kind == "linear" else math.log(step + 1) / math.log(max(steps, 2))


def factor(step: int, section: SchedulerSection, peak: float, warmup_steps: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by in the optimizer step after ``step`` applied ones.

    Args:
        peak: the learning rate at 1.0, in which ``warmup_min_lr`` is expressed.
        total_steps: where a decay ends; not read by WarmupLR.
    """
    params = section.params
    if step < warmup_steps:
        floor = params.warmup_min_ratio if section.type == "WarmupCosineLR" else params.warmup_min_lr / peak
        return floor + (1.0 - floor) * warmup(step + 1, warmup_steps, params.warmup_type)
    if section.type == "WarmupLR":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if section.type == "WarmupDecayLR":
        return 1.0 - progress
    return params.cos_min_ratio + (1.0 - params.cos_min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


def from_config(config: Config, optimizer: torch.optim.Optimizer) -> LambdaLR | None:
    """The scheduler that ``config.scheduler`` describes, or None. Steps once for each step that was applied.

    Raises:
        ConfigError: for a decay without its end.
    """
    section = config.scheduler
    if section is None:
        return None
    if section.type != "WarmupLR" and config.num_train_steps is None:
        raise ConfigError(f"scheduler.params.total_num_steps is missing: {section.type} needs to know where it ends")
    if section.params.warmup_max_lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = section.params.warmup_max_lr
    return LambdaLR(
        optimizer,
        functools.partial(
            factor,
            section=section,
            peak=float(optimizer.param_groups[0]["lr"]),
            warmup_steps=1000 if config.num_warmup_steps is None else config.num_warmup_steps,
            total_steps=config.num_train_steps or 0,
        ),
    )


def move_to(scheduler: LambdaLR, step: int) -> None:
    """Sets the learning rates to what they are after ``step`` applied steps."""
    scheduler.last_epoch = step
    for group, base, share in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * share(step)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
