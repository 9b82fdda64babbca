"""What of an engine goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from deepfast import reference
from deepfast.engine import checkpoint, ranks, schedule
from deepfast.engine.boxes import run_of
from deepfast.engine.config import Config
from deepfast.engine.parts import Part
from deepfast.engine.saving import Save, lay_out
from deepfast.engine.snapshot import Snapshot
from deepfast.optim import Optimizer
from deepfast.optim.state import HALF
from deepfast.scaler import LossScaler

log = logging.getLogger("deepfast")


class SharedCheckpointError(checkpoint.CheckpointError, ranks.SharedError):
    """One that another rank has raised, and prints."""


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
    _saving: Save | None = None  # what is being written

    def _parts(self) -> list[Part]:
        """This rank's part of each parameter that the optimizer steps, in the order of its groups."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [self._sharded.get(p) or Part.all_of(p) for p in held]

    def _params(self) -> list[Tensor]:
        return [part.whole for part in self._parts()]

    def _names(self) -> list[str]:
        """Those of the same parameters in the module; of one that is not in it, its number in the optimizer."""
        known: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
        return [known.get(p, f"#{index}") for index, p in enumerate(self._params())]

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        *,
        wait: bool = True,
        keep: int | None = None,
        timeout: float = 1800.0,
    ) -> Path:
        """Writes ``save_dir/tag`` (default: the step's number) and points ``save_dir/latest`` at it. All ranks call it.

        ``save_dir`` is on a file system that all ranks see. One checkpoint is written at a time: a call waits for the
        one before.

        Args:
            client_state: the caller's own, as JSON can hold it.
            wait: False: returns as soon as all that is saved is copied to the host's memory, and writes it beside
                training. :meth:`wait_for_checkpoint` tells how that has ended, and so does the next save or load;
                Python ends only when it has.
            keep: deletes all but the newest so many checkpoints, once this one is there.
            timeout: seconds that rank 0 waits for the other ranks' files, when it has written its own.

        Raises:
            CheckpointError: on all ranks, if one cannot write, or could not write the checkpoint before. What was
                there before is still there.
        """
        self.wait_for_checkpoint()
        directory = Path(save_dir)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)

        def begin() -> None:
            if self.rank == 0:
                lay_out(directory, tag, self.world_size)

        snapshot = ranks.on_every_rank(lambda: self._snapshot(tag, client_state or {}), SharedCheckpointError)
        ranks.on_every_rank(begin, SharedCheckpointError)
        self._saving = Save(directory, tag, snapshot, keep, timeout)
        if wait:
            self.wait_for_checkpoint()
        return directory / tag

    def wait_for_checkpoint(self) -> None:
        """Returns when a checkpoint that is being written is there, on all ranks. All ranks call it.

        Raises:
            CheckpointError: on all ranks, if it could not be written. What was there before is still there.
        """
        if self._saving is not None:
            self._saving.join()
            saving, self._saving = self._saving, None
            ranks.on_every_rank(saving.check, SharedCheckpointError)

    def _snapshot(self, tag: str, client_state: dict[str, Any]) -> Snapshot:
        checkpoint.check_tag(tag)
        snapshot = Snapshot(self.rank, self.world_size)
        snapshot.add_model(checkpoint.unique(self.module.state_dict()))
        optimizer = snapshot.add_optimizer(self.optimizer, self._parts(), self._names())
        snapshot.add_random_state()
        state = {
            "format": 2,
            "world_size": self.world_size,
            "global_steps": self.global_steps,
            "micro_steps": self.micro_steps,
            "skipped_steps": self._skipped,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else _without_callables(self.lr_scheduler.state_dict()),
            "client_state": client_state,
        }
        snapshot.state = checkpoint.to_json(state)
        return snapshot

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
        self.wait_for_checkpoint()
        directory = Path(load_dir)
        newest = ranks.on_every_rank(lambda: checkpoint.latest(directory) if tag is None else str(tag))
        tag = ranks.of_rank_0(newest)  # all load the same, whatever their file systems have heard of
        if tag is None:
            log.warning("%s holds no checkpoint: nothing was loaded", directory)
            return None, {}
        verify = functools.partial(checkpoint.verify, directory, tag, self.rank, self.world_size)
        folder = ranks.on_every_rank(verify, SharedCheckpointError)
        state, values, moments, random = ranks.on_every_rank(lambda: self._read(folder), SharedCheckpointError)
        self._load_optimizer(moments, folder)
        self._load_module(values)
        self._load_scaler(state["scaler"])
        self._load_scheduler(state["lr_scheduler"])
        self.global_steps, self._skipped = state["global_steps"], state["skipped_steps"]
        self.micro_steps = self.global_steps * self.config.batch_triple()[2]  # sums in progress are not saved
        if state["world_size"] == self.world_size:
            _set_rng(random)
        else:
            log.info("written by %d rank(s), read by %d: random states start anew", state["world_size"],
                     self.world_size)  # fmt: skip
        self.zero_grad()
        return str(folder), state["client_state"]

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
        """The rest, the module's values, the optimizer's state and the random state; nothing is changed yet."""
        from deepfast.engine.reading import stored  # torch.distributed.checkpoint takes its time

        state = checkpoint.read_json(folder / "state.json")
        names = self._names()
        tensors, optimizer = stored(folder, state, names)
        values = self._asked_values(tensors, names)
        moments = optimizer_state(tensors, optimizer, self._parts(), names)
        own = f"rng.{self.rank}."
        random = {key.removeprefix(own): tensors.ask(key) for key in tensors.shapes if key.startswith(own)}
        tensors.read()
        return state, values, moments, random

    def _asked_values(self, tensors: Any, names: list[str]) -> dict[str, Tensor]:
        """What each parameter and buffer is to be."""
        wanted = checkpoint.unique(self.module.state_dict(keep_vars=True))
        given = {key.removeprefix("model."): shape for key, shape in tensors.shapes.items() if key.startswith("model.")}
        wrong = sorted(wanted.keys() ^ given.keys()) or [name for name, t in wanted.items() if t.shape != given[name]]
        if wrong:
            raise checkpoint.CheckpointError(f"{tensors.folder}: another model: {wrong[0]!r} does not fit")
        masters = dict(zip(self._params(), (f"optim.state.{name}.master" for name in names), strict=True))
        values = {}
        for name, t in wanted.items():
            # From a 16-bit run to an fp32 one: what was rounded is there in full, too.
            master = masters.get(t, "") if t.dtype == torch.float32 else ""
            values[name] = tensors.ask(master if master in tensors.shapes else f"model.{name}")
        return values

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
                for name in group.keys() - values.keys() - loaded:
                    del group[name]  # what the configuration does not say is as the optimizer has it by itself
                group.update(values)

    @torch.no_grad()
    def _load_module(self, values: dict[str, Tensor]) -> None:
        """Parameters and buffers, and from an fp32 run to a 16-bit one the masters."""
        own = checkpoint.unique(self.module.state_dict(keep_vars=True))
        parts = {part.whole: part for part in self._parts()}
        for name, t in values.items():
            p, part = own[name], parts.get(own[name])
            if (
                part is None
                or t.dtype != torch.float32
                or p.dtype not in HALF
                or not isinstance(self.optimizer, Optimizer)
            ):
                p.copy_(t)
                continue
            p.copy_(reference.round_master(t, p.dtype))
            self.optimizer.set_master(part.mine, run_of(t, p, part.begin, part.end) if part.sharded else t)

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


def _without_callables(value: Any) -> Any:
    """A scheduler's state without its functions, which are no state."""
    if isinstance(value, dict):
        return {k: _without_callables(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return type(value)(None if callable(v) else _without_callables(v) for v in value)
    return value


def _set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def optimizer_state(tensors: Any, rest: dict[str, Any], parts: list[Part], names: list[str]) -> dict[str, Any]:
    """A state_dict for the optimizer of ``parts``, its tensors asked for."""
    state: dict[Any, dict[str, Any]] = dict(rest["beside"])
    for index, (part, name) in enumerate(zip(parts, names, strict=True)):
        values = dict(rest["state"].get(name, {}))
        for entry in rest["tensors"].get(name, ()):
            key = f"optim.state.{name}.{entry}"
            alike = part.sharded and entry != "step" and tensors.shapes.get(key) == part.whole.shape
            values[entry] = tensors.ask(key, part if alike else None)
        if values:
            state[index] = values
    return {"state": state, "param_groups": rest["param_groups"]}
