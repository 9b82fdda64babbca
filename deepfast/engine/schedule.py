"""Learning rate over time, as a function of the number of steps that were applied.

DeepSpeed's three schedules step for step (its first two steps both have the warm-up's lowest rate), and the trainer's.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from deepfast.engine.config import Config, SchedulerSection
from deepfast.errors import ConfigError


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """A linear warm-up that begins to rise with the first step, then a cosine to a tenth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 0.1 + 0.9 * (1.0 + math.cos(math.pi * progress)) / 2.0


def factor(step: int, section: SchedulerSection, peak: float, warmup_steps: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by in the optimizer step after ``step`` applied ones.

    Args:
        peak: the learning rate at 1.0, in which ``warmup_min_lr`` is expressed.
        total_steps: where a decay ends; not read by WarmupLR.
    """
    if section.type == "WarmupCosine":
        return warmup_cosine(step, warmup_steps, total_steps)
    params, warmup_steps = section.params, max(warmup_steps, 2)
    cosine = section.type == "WarmupCosineLR"
    floor = params.warmup_min_ratio if cosine else params.warmup_min_lr / peak
    position = max(step - 1, 0)  # DeepSpeed counts from -1
    if position < warmup_steps:
        linear = params.warmup_type == "linear"
        share = position / warmup_steps if linear else math.log(position + 1) / math.log(warmup_steps)
    elif section.type == "WarmupLR":
        share = 1.0
    elif section.type == "WarmupDecayLR":
        share = max((total_steps - position) / max(total_steps - warmup_steps, 1), 0.0)
    elif cosine:
        progress = min((position - warmup_steps + 1) / max(total_steps - warmup_steps, 1), 1.0)
        floor, share = params.cos_min_ratio, (1.0 + math.cos(math.pi * progress)) / 2.0
    else:
        raise RuntimeError(f"the schedule {section.type!r} has no curve")
    return floor + (1.0 - floor) * share


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
