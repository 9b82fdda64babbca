"""What the trainer fills in where the configuration leaves it to the script."""

from __future__ import annotations

import logging

from deepfast.engine.config import Config
from deepfast.engine.config.schema import OptimizerSection, SchedulerSection
from deepfast.errors import ConfigError
from deepfast.train.documents import folder

log = logging.getLogger("deepfast")


def trainer_defaults(config: Config) -> Config:
    """A copy in which what ``deepfast.initialize`` leaves to the script has the trainer's values.

    Raises:
        ConfigError: for keys of the trainer that do not go together.
    """
    config = config.model_copy(deep=True)
    _check_validation(config)
    for key in ("sample_steps", "sample_prompt"):
        if getattr(config, key) and not config.sample_tokens:
            raise ConfigError(f"{key} is set, and sample_tokens=0: no text is generated: take one of them out")
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


def _check_validation(config: Config) -> None:
    """Checks what a loss is measured on while training, if there is anything; then it has its number of steps."""
    if config.eval_dataset_dir is None and config.eval_share is None:
        for key in ("eval_steps", "eval_sequences"):
            if getattr(config, key) is not None:
                raise ConfigError(f"{key} is set, and nothing to validate on: set eval_share or eval_dataset_dir")
        return
    if config.eval_dataset_dir is not None and config.eval_share is not None:
        raise ConfigError("eval_dataset_dir and eval_share are both set: keep one")
    if config.streaming and config.eval_share is not None:
        raise ConfigError(
            "eval_share is a share of all of the data, and streaming reads no more than it needs: set eval_dataset_dir"
        )
    if config.eval_dataset_dir is not None:
        trained, held = (folder(name).resolve() for name in (config.dataset_dir, config.eval_dataset_dir))
        if held.is_relative_to(trained) or trained.is_relative_to(held):
            raise ConfigError(
                f"eval_dataset_dir={config.eval_dataset_dir!r} and dataset_dir={config.dataset_dir!r}: one is in the "
                "other, and would be trained on: keep them apart, or set eval_share"
            )
    config.eval_steps = config.eval_steps or config.save_steps
