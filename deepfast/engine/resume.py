"""What of an engine goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from deepfast import reference
from deepfast.engine import checkpoint, ranks, schedule
from deepfast.engine.boxes import run_of
from deepfast.engine.config import Config
from deepfast.engine.gradients import Gradients
from deepfast.engine.parts import Part
from deepfast.engine.saving import Save, lay_out
from deepfast.engine.snapshot import Snapshot
from deepfast.optim import Optimizer
from deepfast.optim.shards import is_sharded
from deepfast.optim.state import HALF
from deepfast.scaler import LossScaler

if TYPE_CHECKING:
    from deepfast.engine.units import Units

log = logging.getLogger("deepfast")


class SharedCheckpointError(checkpoint.CheckpointError, ranks.SharedError):
    """One that another rank has raised, and prints."""


class Resumable(nn.Module):
    """The part of :class:`deepfast.Engine` that is saved and loaded."""

    _config: Config
    module: nn.Module
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: LRScheduler | None = None
    scaler: LossScaler
    rank: int
    world_size: int
    global_steps: int
    micro_steps: int
    _skipped: int
    _own_optimizer: bool  # the configuration describes it
    _own_scheduler: bool
    _gradients: Gradients | None = None  # None: there is no optimizer
    _units: Units | None = None  # of a module whose weights lie in parts over the ranks (stage 3)
    _saving: Save | None = None  # what is being written

    def _parts(self) -> list[Part]:
        """This rank's part of each parameter that the optimizer steps, in the order of its groups."""
        return [] if self._gradients is None else self._gradients.parts()

    def _params(self) -> list[Tensor]:
        return [part.whole for part in self._parts()]

    def _names(self) -> list[str]:
        """Those of the same parameters in the module; of one that is not in it, its number in the optimizer."""
        self._apart()
        known: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
        return [known.get(p, f"#{index}") for index, p in enumerate(self._params())]

    def _apart(self) -> None:
        """Before the module's parameters are looked at: at stage 3 those that have come together go apart."""
        if self._units is not None:
            self._units.apart()

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
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
            save_latest: False: ``latest`` stays as it is.
            exclude_frozen_parameters: leaves out what ``requires_grad`` is False of; loading then needs
                ``load_module_strict=False``.
            wait: False: returns as soon as all that is saved is copied to the host's memory, and writes it beside
                training. :meth:`wait_for_checkpoint` tells how that has ended, and so does the next save or load;
                Python ends only when it has.
            keep: deletes all but the newest so many checkpoints, once this one is there.
            timeout: seconds that rank 0 waits for the other ranks' files, when it has written its own.

        Raises:
            CheckpointError: on all ranks, if one cannot write, or could not write the checkpoint before. What was
                there before is still there.
        """
        if keep is not None and not (isinstance(keep, int) and keep >= 1):
            raise ValueError(f"save_checkpoint(): keep is how many checkpoints are left, at least 1, got {keep!r}")
        if not hasattr(timeout, "__float__"):
            raise TypeError(f"save_checkpoint(): timeout is a number of seconds, got {timeout!r}")
        self.wait_for_checkpoint()
        directory = Path(save_dir)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)

        def begin() -> None:
            if self.rank == 0:
                lay_out(directory, tag, self.world_size)

        def copied() -> Snapshot:
            return self._snapshot(tag, client_state or {}, exclude_frozen_parameters)

        snapshot = ranks.on_every_rank(copied, SharedCheckpointError)
        ranks.on_every_rank(begin, SharedCheckpointError)
        self._saving = Save(directory, tag, snapshot, keep, timeout, save_latest)
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

    def _snapshot(self, tag: str, client_state: dict[str, Any], exclude_frozen: bool) -> Snapshot:
        checkpoint.check_tag(tag)
        snapshot = Snapshot(self.rank, self.world_size)
        frozen = {name for name, p in self.module.named_parameters() if exclude_frozen and not p.requires_grad}
        self._apart()
        model = checkpoint.unique(self.module.state_dict(keep_vars=True))
        snapshot.add_model({name: t for name, t in model.items() if name not in frozen})
        optimizer = None
        if self.optimizer is not None:
            optimizer = snapshot.add_optimizer(self.optimizer, self._parts(), self._names())
        snapshot.add_random_state()
        state = {
            "format": 2,
            "world_size": self.world_size,
            "global_steps": self.global_steps,
            "micro_steps": self.micro_steps,
            "skipped_steps": self._skipped,
            "optimizer": optimizer,
            "optimizer_kind": None if self.optimizer is None else _kind(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "lr_scheduler": self._scheduler_state(),
            "client_state": client_state,
        }
        snapshot.state = checkpoint.to_json(state)
        return snapshot

    def _scheduler_state(self) -> dict[str, Any] | None:
        scheduler = self.lr_scheduler
        if scheduler is None or not hasattr(scheduler, "state_dict"):  # none, or one that can do nothing but step()
            return None
        return _without_callables(scheduler.state_dict())

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Loads ``load_dir/tag`` (default: what ``latest`` names). All ranks call it.

        Of an optimizer, a schedule and a loss scale that the configuration describes, only what they have accumulated
        is loaded: a learning rate that has been changed in the configuration holds.

        Args:
            load_module_strict: False: what only the module or only the checkpoint has is left alone, with a line.
            load_optimizer_states: False: moments and masters begin anew.
            load_lr_scheduler_states: False: the schedule begins anew.
            load_module_only: only the weights and buffers: no steps are counted, no random state is set.
            custom_load_fn: ``custom_load_fn(src=weights and buffers by name, dst=module)`` loads the module.

        Returns:
            The checkpoint's path and the client_state that was saved; (None, None) and a warning where ``load_dir``
            holds no checkpoint.

        Raises:
            CheckpointError: for one that is damaged or belongs to another model, and for a tag that is not among those
                in ``load_dir``.
        """
        self.wait_for_checkpoint()
        directory = Path(load_dir)
        newest = ranks.on_every_rank(lambda: self._tag(directory, tag))
        tag = ranks.of_rank_0(newest)  # all load the same, whatever their file systems have heard of
        if tag is None:
            log.warning("%s holds no checkpoint: nothing was loaded%s", directory, checkpoint.hint(directory))
            return None, None
        verify = functools.partial(checkpoint.verify, directory, tag, self.rank, self.world_size)
        folder = ranks.on_every_rank(verify, SharedCheckpointError)
        with_optimizer = load_optimizer_states and not load_module_only and self.optimizer is not None

        def read() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None, dict[str, Tensor]]:
            return self._read(folder, load_module_strict and custom_load_fn is None, with_optimizer, custom_load_fn)

        state, values, moments, random = ranks.on_every_rank(read, SharedCheckpointError)
        if moments is not None and self.optimizer is not None:
            self._load_optimizer(self.optimizer, moments, folder)
        if custom_load_fn is None:
            self._load_module(values)
        else:
            custom_load_fn(src=values, dst=self.module)
        if not load_module_only:
            self._load_scaler(state["scaler"])
            if load_lr_scheduler_states:
                self._load_scheduler(state["lr_scheduler"])
            self.global_steps, self._skipped = state["global_steps"], state["skipped_steps"]
            # Sums in progress are not saved.
            self.micro_steps = self.global_steps * self._config.batch_triple()[2]
            self._load_random(random, state["world_size"])
        if self._gradients is not None:
            self._gradients.clear()
            self._gradients.position = 0
        return str(folder), state["client_state"]

    @staticmethod
    def _tag(directory: Path, tag: str | None) -> str | None:
        """The one to load; None where there is none at all."""
        if tag is None:
            return checkpoint.latest(directory)
        return str(tag) if (directory / str(tag)).exists() or checkpoint.tags(directory) else None

    def _read(
        self, folder: Path, strict: bool, with_optimizer: bool, all_of_it: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None, dict[str, Tensor]]:
        """The rest, the module's values, the optimizer's state and the random state; nothing is changed yet."""
        from deepfast.engine.reading import stored  # torch.distributed.checkpoint takes its time

        state = checkpoint.read_json(folder / "state.json")
        names = self._names()
        tensors, optimizer = stored(folder, state, names)
        if all_of_it:
            values = {k.removeprefix("model."): tensors.ask(k) for k in tensors.shapes if k.startswith("model.")}
        else:
            values = self._asked_values(tensors, strict)
        moments = None
        if with_optimizer and optimizer is None:
            raise checkpoint.CheckpointError(f"{folder}: was saved without an optimizer: pass load_module_only=True")
        if with_optimizer:
            saved, own = state.get("optimizer_kind"), _kind(self.optimizer)
            if saved not in (None, own):
                raise checkpoint.CheckpointError(f"{folder}: does not fit this optimizer: it is {saved}'s, not {own}'s")
            moments = optimizer_state(tensors, optimizer, self._parts(), names)
        rng = f"rng.{self.rank}."
        random = {key.removeprefix(rng): tensors.ask(key) for key in tensors.shapes if key.startswith(rng)}
        tensors.read()
        return state, values, moments, random

    def _asked_values(self, tensors: Any, strict: bool) -> dict[str, Tensor]:
        """What each parameter and buffer is to be."""
        self._apart()
        wanted = checkpoint.unique(self.module.state_dict(keep_vars=True))
        given = {key.removeprefix("model."): shape for key, shape in tensors.shapes.items() if key.startswith("model.")}
        unmatched = sorted(wanted.keys() ^ given.keys())
        wrong = (unmatched if strict else []) or [n for n, t in wanted.items() if t.shape != given.get(n, t.shape)]
        if wrong:
            raise checkpoint.CheckpointError(f"{tensors.folder}: another model: {wrong[0]!r} does not fit")
        if unmatched:
            log.warning("%s: left alone: %s", tensors.folder, ", ".join(unmatched))
        values = {}
        for name, t in wanted.items():
            # From a 16-bit run to an fp32 one: what was rounded is there in full, too.
            master = f"optim.state.{name}.master" if t.dtype == torch.float32 else ""
            if name in given:
                key = master if master in tensors.shapes else f"model.{name}"
                values[name] = tensors.ask(key, t if is_sharded(t) else None)
        return values

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, given: dict[str, Any], folder: Path) -> None:
        # A caller's scheduler steers from the learning rate that it finds: there, that is state.
        loaded = {"params"} if self._own_scheduler else {"params", "lr", "initial_lr"}
        configured = [{k: v for k, v in group.items() if k not in loaded} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(given)
        except (ValueError, RuntimeError, KeyError) as error:
            raise checkpoint.CheckpointError(f"{folder}: does not fit this optimizer: {error}") from None
        if self._own_optimizer:
            for group, values in zip(optimizer.param_groups, configured, strict=True):
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
            if part.sharded:
                p.copy_(reference.round_master(t, p.dtype))
                t = run_of(t, p, part.begin, part.end)
            self.optimizer.set_master(part.mine, t)

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

    def _load_random(self, states: dict[str, Tensor], world_size: int) -> None:
        if world_size != self.world_size:
            log.info("written by %d rank(s), read by %d: random states start anew", world_size, self.world_size)
            return
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


def _kind(optimizer: Any) -> str:
    """Whose state it keeps: of a subclass, that of torch's or ours above it. AdamW's is Adam's."""
    base = (c for c in type(optimizer).__mro__ if c.__module__.startswith(("deepfast.optim.", "torch.optim.")))
    name = next(base, type(optimizer)).__name__
    return {"AdamW": "Adam", "Optimizer": type(optimizer).__name__}.get(name, name)


def _without_callables(value: Any) -> Any:
    """A scheduler's state without its functions, which are no state."""
    if isinstance(value, dict):
        return {k: _without_callables(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return type(value)(None if callable(v) else _without_callables(v) for v in value)
    return value


def optimizer_state(tensors: Any, rest: dict[str, Any], parts: list[Part], names: list[str]) -> dict[str, Any]:
    """A state_dict for the optimizer of ``parts``, its tensors asked for."""
    state: dict[Any, dict[str, Any]] = dict(rest["beside"])
    for index, (part, name) in enumerate(zip(parts, names, strict=True)):
        values = dict(rest["state"].get(name, {}))
        for entry in rest["tensors"].get(name, ()):
            key = f"optim.state.{name}.{entry}"
            alike = entry != "step" and tensors.shapes.get(key) == part.whole.shape
            cut = part if part.sharded else part.mine if is_sharded(part.mine) else None
            values[entry] = tensors.ask(key, cut if alike else None)
        if values:
            state[index] = values
    return {"state": state, "param_groups": rest["param_groups"]}
