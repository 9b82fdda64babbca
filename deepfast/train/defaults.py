"""What the trainer fills in where the configuration leaves it to the script."""

from __future__ import annotations

import logging

from deepfast.engine.config import Config
from deepfast.engine.config.schema import OptimizerSection, SchedulerSection

log = logging.getLogger("deepfast")


def trainer_defaults(config: Config) -> Config:
    """A copy in which what ``deepfast.initialize`` leaves to the script has the trainer's values."""
    config = config.model_copy(deep=True)
    config.num_train_steps = config.num_train_steps or 1000
    config.num_warmup_steps = config.num_warmup_steps or 0
    if config.gradient_clipping is None:
        config.gradient_clipping = 1.0
    config.optimizer = config.optimizer or OptimizerSection()
    params = config.optimizer.params
    if params.lr is None:
        params.lr = 5e-4
    if config.optimizer.type in ("AdamW", "Adam"):
        params.betas = params.betas or (0.9, 0.95)
    if params.weight_decay is None:
        params.weight_decay = 0.1
    if config.num_warmup_steps > config.num_train_steps:
        log.warning(
            "num_warmup_steps=%d is more than num_train_steps=%d: the learning rate never reaches its peak",
            config.num_warmup_steps,
            config.num_train_steps,
        )
    config.scheduler = config.scheduler or SchedulerSection(type="WarmupCosine")
    return config
