"""The batch triple: train_batch_size = micro-batch · accumulation · ranks."""

from __future__ import annotations

import logging

from deepfast.engine.config.schema import Config
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


def resolve_batch(config: Config, world: int, *, one_process: bool = False) -> None:
    """Fills in the batch triple: train_batch_size = micro-batch · accumulation · world. Any two give the third.

    Args:
        world: number of data-parallel ranks.
        one_process: ``gradient_accumulation_steps`` was written for one process: divide it by the world, so that the
            same file trains the same global batch on any number of ranks.

    Raises:
        ConfigError: for a triple that does not multiply.
    """
    batch, micro, accumulation = (
        config.train_batch_size,
        config.train_micro_batch_size,
        config.gradient_accumulation_steps,
    )
    if one_process and world > 1 and accumulation and not (batch and micro and batch == micro * accumulation * world):
        if accumulation % world:
            raise ConfigError(
                f"gradient_accumulation_steps={accumulation} cannot be divided among {world} ranks: use a multiple"
            )
        log.info("gradient_accumulation_steps=%d over %d ranks: %d each", accumulation, world, accumulation // world)
        accumulation //= world
    if micro is None and batch is not None:
        accumulation = accumulation or 1
        micro = _share(batch, accumulation * world, f"gradient_accumulation_steps {accumulation} x ranks {world}")
    if micro is None:
        auto = [key for key in ("train_batch_size", "train_micro_batch_size_per_gpu") if key in config._auto]
        if auto:
            raise ConfigError(f'{auto[0]}="auto": only a framework could fill that in: write a number')
        raise ConfigError("train_batch_size or train_micro_batch_size is missing")
    if accumulation is None:
        accumulation = 1 if batch is None else _share(batch, micro * world, f"micro-batch {micro} x ranks {world}")
    batch = micro * accumulation * world if batch is None else batch
    if batch != micro * accumulation * world:
        raise ConfigError(
            f"train_batch_size={batch}, but micro-batch {micro} x gradient_accumulation_steps {accumulation} x ranks "
            f"{world} = {micro * accumulation * world}: change one of them, or leave one out"
        )
    config.train_batch_size, config.train_micro_batch_size, config.gradient_accumulation_steps = (
        batch,
        micro,
        accumulation,
    )


def _share(batch: int, divisor: int, what: str) -> int:
    if batch % divisor:
        raise ConfigError(f"train_batch_size={batch} cannot be divided by {what} = {divisor}: use a multiple")
    return batch // divisor
