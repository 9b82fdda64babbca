"""What of an engine goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from deepfast.engine import checkpoint, schedule

if TYPE_CHECKING:
    from deepfast.engine.engine import Engine

log = logging.getLogger("deepfast")


def save(engine: Engine, directory: Path, tag: str | None, client_state: dict[str, Any]) -> Path:
    """:meth:`deepfast.Engine.save_checkpoint`."""
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    if not tag or "/" in tag or tag.startswith(".") or tag == "latest":
        raise checkpoint.CheckpointError(f"{tag!r} cannot name a checkpoint: it is to be the name of a folder")
    try:
        if engine.rank == 0:
            folder = checkpoint.begin(directory, tag)
            _write(engine, folder, client_state)
        _barrier(engine)
        checkpoint.write_tensors(checkpoint.staging(directory, tag) / f"rank{engine.rank}.safetensors", _rng())
        _barrier(engine)
        if engine.rank == 0:
            checkpoint.commit(directory, tag)
        _barrier(engine)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise checkpoint.CheckpointError(f"{directory / tag}: cannot be written: {why}") from None
    return directory / tag


def _write(engine: Engine, folder: Path, client_state: dict[str, Any]) -> None:
    tensors, optimizer = checkpoint.pack_optimizer(engine.optimizer)
    checkpoint.write_tensors(folder / "model.safetensors", checkpoint.unique(engine.module.state_dict()))
    checkpoint.write_tensors(folder / "optimizer.safetensors", tensors)
    state = {
        "format": 1,
        "world_size": engine.world_size,
        "global_steps": engine.global_steps,
        "micro_steps": engine.micro_steps,
        "skipped_steps": engine._skipped,
        "optimizer": optimizer,
        "scaler": engine.scaler.state_dict(),
        "lr_scheduler": None if engine.lr_scheduler is None else _without_callables(engine.lr_scheduler.state_dict()),
        "client_state": client_state,
    }
    checkpoint.write_json(folder / "state.json", state)


def load(engine: Engine, directory: Path, tag: str | None) -> tuple[str | None, dict[str, Any]]:
    """:meth:`deepfast.Engine.load_checkpoint`."""
    tag = checkpoint.latest(directory) if tag is None else str(tag)
    if tag is None:
        log.warning("%s holds no checkpoint: nothing was loaded", directory)
        return None, {}
    folder = checkpoint.verify(directory, tag)
    state = checkpoint.read_json(folder / "state.json")
    if state.get("format") != 1:
        raise checkpoint.CheckpointError(f"{folder}: format {state.get('format')} is not known to this version")
    given = _fitting_module(engine, folder / "model.safetensors")
    tensors = checkpoint.read_tensors(folder / "optimizer.safetensors")
    _load_optimizer(engine, checkpoint.unpack_optimizer(tensors, state["optimizer"]), folder)
    _load_module(engine, given, tensors)
    _load_scaler(engine, state["scaler"])
    _load_scheduler(engine, state["lr_scheduler"])
    engine.global_steps, engine._skipped = state["global_steps"], state["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()  # sums in progress are not saved
    if state["world_size"] == engine.world_size:
        _set_rng(checkpoint.read_tensors(folder / f"rank{engine.rank}.safetensors"))
    else:
        log.info("written by %d rank(s), read by %d: random states start anew", state["world_size"],
                 engine.world_size)  # fmt: skip
    engine.zero_grad()
    return str(folder), state["client_state"]


def _fitting_module(engine: Engine, path: Path) -> dict[str, Tensor]:
    wanted = checkpoint.unique(engine.module.state_dict())
    given = checkpoint.read_tensors(path)
    wrong = sorted(wanted.keys() ^ given.keys()) or [name for name, t in given.items() if t.shape != wanted[name].shape]
    if wrong:
        raise checkpoint.CheckpointError(f"{path}: another model: {wrong[0]!r} does not fit")
    return given


def _load_optimizer(engine: Engine, given: dict[str, Any], folder: Path) -> None:
    # A caller's scheduler steers from the learning rate that it finds: there, that is state.
    loaded = {"params"} if engine._own_scheduler else {"params", "lr", "initial_lr"}
    configured = [{k: v for k, v in group.items() if k not in loaded} for group in engine.optimizer.param_groups]
    try:
        engine.optimizer.load_state_dict(given)
    except (ValueError, RuntimeError, KeyError) as error:
        raise checkpoint.CheckpointError(f"{folder}: does not fit this optimizer: {error}") from None
    if engine._own_optimizer:
        for group, values in zip(engine.optimizer.param_groups, configured, strict=True):
            group.update(values)


@torch.no_grad()
def _load_module(engine: Engine, given: dict[str, Tensor], optimizer_tensors: dict[str, Tensor]) -> None:
    """Parameters and buffers; where the precision has changed since, the fp32 values there are make up for it."""
    own = checkpoint.unique(engine.module.state_dict(keep_vars=True))
    for name, t in given.items():
        own[name].copy_(t)
        master = engine.optimizer.state.get(own[name], {}).get("master")
        if master is not None and t.dtype == torch.float32:  # from an fp32 run to a 16-bit one
            master.copy_(t)
    for index, p in enumerate(engine._params()):
        saved = optimizer_tensors.get(f"{index}.master")
        if saved is not None and p.dtype == torch.float32:  # from a 16-bit run to an fp32 one
            p.copy_(saved)


def _load_scaler(engine: Engine, given: dict[str, Any]) -> None:
    own = engine.scaler.state_dict()
    if given and own:
        fixed = ("growth_factor", "backoff_factor", "growth_interval")
        kept = fixed if engine.scaler.is_dynamic() else (*fixed, "scale")
        engine.scaler.load_state_dict({**given, **{k: own[k] for k in kept}})


def _load_scheduler(engine: Engine, given: dict[str, Any] | None) -> None:
    if given is None or engine.lr_scheduler is None:
        return
    if not engine._own_scheduler:
        engine.lr_scheduler.load_state_dict(given)
    elif isinstance(engine.lr_scheduler, LambdaLR):
        schedule.move_to(engine.lr_scheduler, given["last_epoch"])


def _barrier(engine: Engine) -> None:
    if engine.world_size > 1:
        dist.barrier()


def _without_callables(value: Any) -> Any:
    """A scheduler's state without its functions, which are no state."""
    if isinstance(value, dict):
        return {k: _without_callables(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return type(value)(None if callable(v) else _without_callables(v) for v in value)
    return value


def _rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
