"""Learning rate over time, as a function of the number of steps that were applied.

DeepSpeed's schedules step for step (of a warm-up the first two steps both have the lowest rate), and the trainer's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from deepfast.engine.config import Config, SchedulerSection
from deepfast.engine.config.schema import SchedulerParams
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


class Schedule(LambdaLR):
    """Sets the learning rate of each group, and where betas move those, after each step that was applied.

    Args:
        rates: for each group the learning rate after so many steps.
        betas: likewise, or None.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rates: list[Callable[[int], float]],
        betas: list[Callable[[int], tuple[float, float]]] | None = None,
    ) -> None:
        self.betas = betas
        super().__init__(optimizer, rates)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [rate(self.last_epoch) for rate in self.lr_lambdas]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._move_betas()

    def _move_betas(self) -> None:
        for group, betas in zip(self.optimizer.param_groups, self.betas or (), strict=False):
            group["betas"] = betas(self.last_epoch)


def move_to(scheduler: Any, step: int) -> None:
    """Sets what a :class:`Schedule` sets to what it is after ``step`` applied steps."""
    scheduler.last_epoch = step
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate
    scheduler._move_betas()
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


# Curves. ``at`` is DeepSpeed's count: -1 in the first step, in which nothing has been applied.


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """A linear warm-up that begins to rise with the first step, then a cosine to a tenth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 0.1 + 0.9 * (1.0 + math.cos(math.pi * progress)) / 2.0


def warmed_up(at: int, steps: int, kind: str) -> float | None:
    """How far a warm-up of so many steps is, 0 to 1; None after it."""
    at = max(at, 0)
    if at >= steps:
        return None
    return at / steps if kind == "linear" else math.log(at + 1) / math.log(steps)


def cycled(at: int, params: SchedulerParams) -> float | None:
    """Where on its way up (and down again) a cycle is, 0 to 1; None after it."""
    first = params.cycle_first_step_size
    second = first if params.cycle_second_step_size is None else params.cycle_second_step_size
    up_stairs = params.cycle_first_stair_count
    down_stairs = up_stairs if params.cycle_second_stair_count is None else params.cycle_second_stair_count
    if at >= first + second:
        return None
    done = (at + 1) % (first + second)
    rises = done <= first
    share = done / first if rises else (first + second - done) / second
    stairs = up_stairs if rises else down_stairs
    return math.floor(share * stairs) / stairs if stairs else share


def decayed(at: int, params: SchedulerParams, rate: float) -> float:
    """After a cycle: 1, and ``rate`` more in each ``decay_step_size`` steps."""
    first, second = params.cycle_first_step_size, params.cycle_second_step_size
    since = at - (first + (first if second is None else second)) + 1
    return 1.0 + rate * since / params.decay_step_size if params.decay_step_size else 1.0


def rate(at: int, section: SchedulerSection, peak: float, warmup_steps: int, total_steps: int, group: int = 0) -> float:
    """The learning rate of a group.

    Args:
        peak: the optimizer's own, where the schedule sets none.
        total_steps: where a decay ends; not read by the schedules without one.
    """
    name, params = section.type, section.params
    if name == "WarmupCosine":
        return peak * warmup_cosine(at + 1, warmup_steps, total_steps)
    if name == "LRRangeTest":
        grown = (at + 1) / params.lr_range_test_step_size
        grown = math.floor(grown) if params.lr_range_test_staircase else grown
        return _of_group(params.lr_range_test_min_lr, group) * (1.0 + params.lr_range_test_step_rate * grown)
    if name == "OneCycle":
        low, high = _of_group(params.cycle_min_lr, group), _of_group(params.cycle_max_lr, group)
        share = cycled(at, params)
        return low / decayed(at, params, params.decay_lr_rate) if share is None else low + (high - low) * share
    warmup_steps = max(warmup_steps, 2)
    share = warmed_up(at, warmup_steps, params.warmup_type)
    if name == "WarmupCosineLR":
        floor = params.warmup_min_ratio
        if at < 0:
            return 0.0
        if share is None:
            progress = min((at - warmup_steps + 1) / max(total_steps - warmup_steps, 1), 1.0)
            floor, share = params.cos_min_ratio, (1.0 + math.cos(math.pi * progress)) / 2.0
        return peak * (floor + (1.0 - floor) * share)
    low = _of_group(params.warmup_min_lr, group)
    if share is None:
        share = 1.0 if name == "WarmupLR" else max((total_steps - at) / max(total_steps - warmup_steps, 1), 0.0)
    return low + (peak - low) * share


def momenta(at: int, params: SchedulerParams, group: int = 0) -> tuple[float, float]:
    """The betas of a group under OneCycle."""
    low, high = _of_group(params.cycle_min_mom, group), _of_group(params.cycle_max_mom, group)
    share = cycled(at, params)
    if at < 0:
        return low, 0.99
    first = high * decayed(at, params, params.decay_mom_rate) if share is None else high - (high - low) * share
    return first, 0.99


def _of_group(value: Any, group: int) -> float:
    return float(value[group] if isinstance(value, list) else value)


def from_config(config: Config, optimizer: torch.optim.Optimizer) -> Schedule | None:
    """The scheduler that ``config.scheduler`` describes, or None. Steps once for each step that was applied.

    Raises:
        ConfigError: for a decay without its end, and for lists that are not as long as there are groups.
    """
    section = config.scheduler
    if section is None:
        return None
    params, total_steps = section.params, config.num_train_steps
    if section.type in ("WarmupDecayLR", "WarmupCosineLR", "WarmupCosine") and total_steps is None:
        raise ConfigError(f"scheduler.params.total_num_steps is missing: {section.type} needs to know where it ends")
    groups = optimizer.param_groups
    for key, value in params:
        if isinstance(value, list) and len(value) != len(groups):
            raise ConfigError(f"scheduler.params.{key}: {len(value)} values for {len(groups)} groups of parameters")
    highest = params.warmup_max_lr
    if highest is None and section.type == "WarmupDecayLR":
        highest = 1e-3
    begin = params.last_batch_iteration
    warmup_steps = 1000 if config.num_warmup_steps is None else config.num_warmup_steps

    def rate_of(group: int) -> Callable[[int], float]:
        own = float(groups[group]["lr"])
        peak = own if highest is None else _of_group(highest, group)

        def after(step: int) -> float:
            if step == 0 and begin >= 0:
                return own
            return rate(begin + step, section, peak, warmup_steps, total_steps or 0, group)

        return after

    betas = None
    if section.type == "OneCycle" and params.cycle_momentum:
        if "betas" in optimizer.defaults:
            betas = [_betas_of(params, i, groups[i]["betas"]) for i in range(len(groups))]
        else:
            log.warning("cycle_momentum: %s has no betas: its momentum stays", type(optimizer).__name__)
    return Schedule(optimizer, [rate_of(i) for i in range(len(groups))], betas)


def _betas_of(params: SchedulerParams, group: int, own: Any) -> Callable[[int], tuple[float, float]]:
    begin = params.last_batch_iteration
    return lambda step: own if step == 0 and begin >= 0 else momenta(begin + step, params, group)
