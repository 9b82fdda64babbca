"""What of an engine goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from deepfast.engine import checkpoint, schedule
from deepfast.engine.config import Config
from deepfast.engine.parts import Part
from deepfast.scaler import LossScaler

log = logging.getLogger("deepfast")


class Resumable(nn.Module):
    """The part of :class:`deepfast.Engine` that is saved and loaded."""

    config: Config
    module: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    scaler: LossScaler
    rank: int
    world_size: int
    global_steps: int
    micro_steps: int
    _skipped: int
    _own_optimizer: bool  # the configuration describes it
    _own_scheduler: bool
    _sharded: dict[Tensor, Part]  # what the optimizer holds instead of whole parameters

    def _parts(self) -> list[Part]:
        """This rank's part of each parameter that the optimizer steps, in the order of its groups."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [self._sharded.get(p) or Part.all_of(p) for p in held]

    def _params(self) -> list[Tensor]:
        return [part.whole for part in self._parts()]

    def save_checkpoint(
        self, save_dir: str | os.PathLike[str], tag: str | None = None, client_state: dict[str, Any] | None = None
    ) -> Path:
        """Writes ``save_dir/tag`` (default: the step's number) and points ``save_dir/latest`` at it. All ranks call it.

        Args:
            client_state: the caller's own, as JSON can hold it.

        Raises:
            CheckpointError: if it cannot be written. What was there before is still there.
        """
        directory = Path(save_dir)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        if not tag or "/" in tag or tag.startswith(".") or tag == "latest":
            raise checkpoint.CheckpointError(f"{tag!r} cannot name a checkpoint: it is to be the name of a folder")
        try:
            if self.rank == 0:
                folder = checkpoint.begin(directory, tag)
                self._write(folder, client_state or {})
            self._barrier()
            checkpoint.write_tensors(checkpoint.staging(directory, tag) / f"rank{self.rank}.safetensors", _rng())
            self._barrier()
            if self.rank == 0:
                checkpoint.commit(directory, tag)
            self._barrier()
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise checkpoint.CheckpointError(f"{directory / tag}: cannot be written: {why}") from None
        return directory / tag

    def _write(self, folder: Path, client_state: dict[str, Any]) -> None:
        tensors, optimizer = checkpoint.pack_optimizer(self.optimizer)
        checkpoint.write_tensors(folder / "model.safetensors", checkpoint.unique(self.module.state_dict()))
        checkpoint.write_tensors(folder / "optimizer.safetensors", tensors)
        state = {
            "format": 1,
            "world_size": self.world_size,
            "global_steps": self.global_steps,
            "micro_steps": self.micro_steps,
            "skipped_steps": self._skipped,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else _without_callables(self.lr_scheduler.state_dict()),
            "client_state": client_state,
        }
        checkpoint.write_json(folder / "state.json", state)

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], tag: str | None = None
    ) -> tuple[str | None, dict[str, Any]]:
        """Loads ``load_dir/tag`` (default: what ``latest`` names). All ranks call it.

        Of an optimizer, a schedule and a loss scale that the configuration describes, only what they have accumulated
        is loaded: a learning rate that has been changed in the configuration holds.

        Returns:
            The checkpoint's path and the client_state that was saved; (None, {}) and a warning where ``load_dir``
            holds no checkpoint and none was named.

        Raises:
            CheckpointError: for one that is damaged or belongs to another model.
        """
        directory = Path(load_dir)
        tag = checkpoint.latest(directory) if tag is None else str(tag)
        if tag is None:
            log.warning("%s holds no checkpoint: nothing was loaded", directory)
            return None, {}
        folder = checkpoint.verify(directory, tag)
        state = checkpoint.read_json(folder / "state.json")
        if state.get("format") != 1:
            raise checkpoint.CheckpointError(f"{folder}: format {state.get('format')} is not known to this version")
        given = self._fitting_module(folder / "model.safetensors")
        tensors = checkpoint.read_tensors(folder / "optimizer.safetensors")
        self._load_optimizer(checkpoint.unpack_optimizer(tensors, state["optimizer"]), folder)
        self._load_module(given, tensors)
        self._load_scaler(state["scaler"])
        self._load_scheduler(state["lr_scheduler"])
        self.global_steps, self._skipped = state["global_steps"], state["skipped_steps"]
        self.micro_steps = self.global_steps * self.config.batch_triple()[2]  # sums in progress are not saved
        if state["world_size"] == self.world_size:
            _set_rng(checkpoint.read_tensors(folder / f"rank{self.rank}.safetensors"))
        else:
            log.info("written by %d rank(s), read by %d: random states start anew", state["world_size"],
                     self.world_size)  # fmt: skip
        self.zero_grad()
        return str(folder), state["client_state"]

    def _fitting_module(self, path: Path) -> dict[str, Tensor]:
        wanted = checkpoint.unique(self.module.state_dict())
        given = checkpoint.read_tensors(path)
        wrong = sorted(wanted.keys() ^ given.keys()) or [
            name for name, t in given.items() if t.shape != wanted[name].shape
        ]
        if wrong:
            raise checkpoint.CheckpointError(f"{path}: another model: {wrong[0]!r} does not fit")
        return given

    def _load_optimizer(self, given: dict[str, Any], folder: Path) -> None:
        # A caller's scheduler steers from the learning rate that it finds: there, that is state.
        loaded = {"params"} if self._own_scheduler else {"params", "lr", "initial_lr"}
        configured = [{k: v for k, v in group.items() if k not in loaded} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(given)
        except (ValueError, RuntimeError, KeyError) as error:
            raise checkpoint.CheckpointError(f"{folder}: does not fit this optimizer: {error}") from None
        if self._own_optimizer:
            for group, values in zip(self.optimizer.param_groups, configured, strict=True):
                group.update(values)

    @torch.no_grad()
    def _load_module(self, given: dict[str, Tensor], optimizer_tensors: dict[str, Tensor]) -> None:
        """Parameters and buffers; where the precision has changed since, the fp32 values there are make up for it."""
        own = checkpoint.unique(self.module.state_dict(keep_vars=True))
        for name, t in given.items():
            own[name].copy_(t)
            master = self.optimizer.state.get(own[name], {}).get("master")
            if master is not None and t.dtype == torch.float32:  # from an fp32 run to a 16-bit one
                master.copy_(t)
        for index, p in enumerate(self._params()):
            saved = optimizer_tensors.get(f"{index}.master")
            if saved is not None and p.dtype == torch.float32:  # from a 16-bit run to an fp32 one
                p.copy_(saved)

    def _load_scaler(self, given: dict[str, Any]) -> None:
        own = self.scaler.state_dict()
        if given and own:
            fixed = ("growth_factor", "backoff_factor", "growth_interval")
            kept = fixed if self.scaler.is_dynamic() else (*fixed, "scale")
            self.scaler.load_state_dict({**given, **{k: own[k] for k in kept}})

    def _load_scheduler(self, given: dict[str, Any] | None) -> None:
        if given is None or self.lr_scheduler is None:
            return
        if not self._own_scheduler:
            self.lr_scheduler.load_state_dict(given)
        elif isinstance(self.lr_scheduler, LambdaLR):
            schedule.move_to(self.lr_scheduler, given["last_epoch"])

    def _barrier(self) -> None:
        if self.world_size > 1:
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
