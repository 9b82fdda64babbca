"""DeepSpeed's entry point."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from deepfast.engine import config as configuration
from deepfast.engine.config import Config
from deepfast.engine.engine import Engine
from deepfast.engine.ranks import init_distributed

log = logging.getLogger("deepfast")


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """DeepSpeed's: adds ``--deepspeed`` (no effect) and ``--deepspeed_config FILE``."""
    group = parser.add_argument_group("deepfast")
    group.add_argument("--deepspeed", action="store_true", help="accepted; deepfast is always on")
    group.add_argument("--deepspeed_config", default=None, help="the JSON configuration file")
    return parser


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: LRScheduler | Callable[[Any], LRScheduler] | None = None,
    distributed_port: int = 29500,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: dict[str, Any] | str | os.PathLike[str] | Config | None = None,
    mesh_param: None = None,
    config_params: dict[str, Any] | str | None = None,
) -> tuple[Engine, torch.optim.Optimizer | None, DataLoader[Any] | None, LRScheduler | None]:
    """DeepSpeed's entry point: ``engine, optimizer, dataloader, lr_scheduler = deepfast.initialize(...)``.

    Args:
        args: an object whose ``deepspeed_config`` names the configuration, where ``config`` is not given.
        model: the module to train; moved to this rank's device, its weights cast to the configured type.
        optimizer: an optimizer, or a function of the parameters that makes one; None: as configured. Without any the
            engine only runs forward.
        model_parameters: parameters or groups for an optimizer that is made here; None: all of the model's.
        training_data: a dataset, for which a loader of micro-batches is made (each rank sees its own share).
        lr_scheduler: a scheduler, or a function of the optimizer that makes one; None: as configured.
        dist_init_required: False leaves torch.distributed alone; otherwise it is started where torchrun has launched
            the process.
        collate_fn: the loader's.
        config: a dict, the path of a JSON (or hjson) file, one in base64, or a :class:`deepfast.engine.config.Config`.
        distributed_port, mpu, mesh_param: model parallelism is not built: only the defaults are accepted.

    Raises:
        ConfigError: for a configuration that cannot be used, a batch triple that does not multiply included.
    """
    if model is None:
        raise ValueError("initialize(): model is missing")
    if not isinstance(model, nn.Module):
        raise TypeError(f"initialize(): model is a torch.nn.Module, not {model!r:.100}")
    if mpu is not None or mesh_param is not None:
        raise ValueError("initialize(): model parallelism (mpu, mesh_param) is not built yet")
    given = configuration.given(config if config is not None else config_params, args)
    if dist_init_required is False:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    else:
        device = init_distributed()
    if not isinstance(given, Config):
        given = configuration.load(given)
        if unused := given.of_the_trainer():
            log.warning("configuration keys of the trainer, without effect in initialize(): %s", ", ".join(unused))
    configuration.resolve_batch(given, dist.get_world_size() if dist.is_initialized() else 1)
    engine = Engine(model, optimizer, model_parameters, given, device, lr_scheduler)
    loader = None
    if training_data is not None:
        loader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
        engine.training_dataloader = loader
    engine.client_optimizer, engine.client_lr_scheduler = optimizer, lr_scheduler
    return engine, engine.optimizer, loader, engine.lr_scheduler
