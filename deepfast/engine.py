"""A small DeepSpeed-style engine: mixed precision, loss scaling, accumulation, reduction, checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from deepfast import build, checkpoint, optim, schedule
from deepfast import config as configuration
from deepfast.buckets import GradientStatistics
from deepfast.config import Config
from deepfast.errors import ConfigError
from deepfast.optim import lost
from deepfast.optim.base import HALF, Optimizer
from deepfast.precision import Precision
from deepfast.ranks import init_distributed
from deepfast.scaler import LossScaler
from deepfast.sums import GradientSums

log = logging.getLogger("deepfast")


class Engine(nn.Module):
    """Trains a module; made by :func:`initialize`.

    A training step is ``loss = engine(batch); engine.backward(loss); engine.step()`` for each micro-batch; every
    ``gradient_accumulation_steps`` of them the optimizer steps.

    Attributes:
        module: the module that was given, its weights in the configured type.
        optimizer, lr_scheduler, scaler: what a step calls; the scheduler only moves on when a step was applied.
        device: where the module is.
        global_steps: optimizer steps so far, skipped ones included.
        micro_steps: micro-batches so far.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None,
        parameters: Any,
        config: Config,
        device: torch.device,
        lr_scheduler: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.device = device
        self.module = module
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        fp16, bf16 = config.fp16, config.bf16
        self.fp16 = bool(fp16 and fp16.enabled)
        self.dtype = torch.float16 if self.fp16 else torch.bfloat16 if bf16 and bf16.enabled else torch.float32
        self._forward = Precision(
            module, self.dtype, device, cast_inputs=self.dtype != torch.float32 and (fp16 is None or fp16.auto_cast)
        )
        if self.world_size > 1:
            for t in (*module.parameters(), *module.buffers()):
                dist.broadcast(t.data, 0)
        self._own_optimizer, self._own_scheduler = optimizer is None, lr_scheduler is None
        self.optimizer = self._make_optimizer(optimizer, parameters)
        self.lr_scheduler = lr_scheduler(self.optimizer) if callable(lr_scheduler) else lr_scheduler
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule.from_config(config, self.optimizer)
        elif isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("initialize(): ReduceLROnPlateau needs a metric: keep it yourself and step it with one")
        self.scaler = self._make_scaler()
        _, _, accumulation = config.batch_triple()
        self._comm = self._make_communicator() if self.world_size > 1 else None
        self._sums = GradientSums(self._params(), self._comm) if accumulation > 1 or self.world_size > 1 else None
        ours = isinstance(self.optimizer, Optimizer)
        self._statistics = GradientStatistics(self._params(), self.optimizer.backend) if ours else None  # type: ignore[attr-defined]
        self._backwards = 0  # since the last step
        self._sync = True
        self._applied = False
        self._skipped = 0
        self._grad_norm: Tensor | None = None
        self.global_steps = 0
        self.micro_steps = 0

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _make_optimizer(self, optimizer: Any, parameters: Any) -> torch.optim.Optimizer:
        clip = self.config.gradient_clipping or None
        if parameters is None:
            parameters = self.module.parameters()
        if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(parameters)
        if optimizer is None:
            if self.config.optimizer is None:
                raise ConfigError("no optimizer: pass optimizer= to initialize(), or set one in the configuration")
            name, arguments = self.config.optimizer.chosen()
            optimizer = getattr(optim, name)(parameters, **arguments)
        elif type(optimizer) in _REPLACED and not optimizer.state:
            optimizer = _replacement(optimizer)
        if isinstance(optimizer, Optimizer):
            if "param_groups" not in vars(optimizer):  # what is set here would stay on a wrapper that has its class
                raise ConfigError(
                    f"initialize() needs the optimizer itself, not a wrapper ({type(optimizer).__name__})"
                )
            optimizer._measure_norm = True
            optimizer.max_grad_norm = clip or optimizer.max_grad_norm
        elif self.dtype in HALF:
            log.warning("%s keeps no fp32 master: it updates 16-bit weights directly", type(optimizer).__name__)
            lost.watch(optimizer, "a deepfast optimizer adds them up in an fp32 master")
        return optimizer

    def _make_scaler(self) -> LossScaler:
        scale, fp16 = self.config.train_loss_scale, self.config.fp16
        if not self.fp16 or fp16 is None:
            if scale:
                log.info("train_loss_scale=%g has no effect without fp16", scale)
            return LossScaler(self.device, enabled=False)
        if scale:
            return LossScaler(self.device, init_scale=scale, dynamic=False)
        return LossScaler(
            self.device,
            init_scale=max(2.0**fp16.initial_scale_power, fp16.min_loss_scale),
            growth_interval=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            min_scale=fp16.min_loss_scale,
        )

    def _make_communicator(self) -> Any:
        """For the gradients' sums; None where torch.distributed has to take them."""
        from deepfast import comm

        try:
            return comm.Communicator()
        except build.BuildError as error:
            log.warning("gradients are reduced by torch.distributed: %s", error)
            return None

    # One step.

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self._forward(*inputs, **kwargs)

    def backward(self, loss: Tensor, weight: float | Tensor | None = None) -> Tensor:
        """Backpropagates the scaled loss and adds the gradients to this step's.

        Args:
            loss: a scalar, the mean over its micro-batch.
            weight: this micro-batch's share (its number of tokens, say), normalized over the step and the ranks.
                Without it, each micro-batch counts 1 / gradient_accumulation_steps.

        Raises:
            RuntimeError: if some micro-batches of a step have a weight and others not.
        """
        if self._sums is None and self._backwards and self.dtype in HALF:
            self._sums = GradientSums(self._params())  # a second loss in one step: from here on, sum in fp32
            self._sums.begin(None, last=False)
            self._sums.add()
        self._backwards += 1
        last = self._sync and self.is_gradient_accumulation_boundary()
        if self._sums is not None:
            self._sums.begin(None if weight is None else float(weight), last)
        elif self._statistics is not None:
            self._statistics.begin()
        self.scaler.scale(loss).backward()
        if self._sums is not None:
            self._sums.add()
        elif self._statistics is not None:
            self._statistics.end()
        return loss

    def step(self) -> None:
        """At a gradient accumulation boundary, reduces the gradients and steps the optimizer; before it, only counts.

        Raises:
            RuntimeError: inside ``no_sync``, and at a boundary without a ``backward`` before it.
        """
        if not self._sync:
            raise RuntimeError("step() must not be called inside no_sync()")
        if self.is_gradient_accumulation_boundary():
            if self._backwards == 0:
                raise RuntimeError("step(): there was no backward() since the last optimizer step")
            self._optimizer_step()
        self.micro_steps += 1

    def _optimizer_step(self) -> None:
        optimizer = self.optimizer
        divisor, statistics = 1.0, None
        if self._sums is not None:
            statistics = self._sums.finish()
            divisor = self._sums.divisor(self.gradient_accumulation_steps() * self.world_size)
            self._sums.hand_over()
        elif self._statistics is not None:
            statistics = self._statistics.take()
        if isinstance(optimizer, Optimizer):
            self._grad_norm = self._fused_step(optimizer, divisor, statistics)
        else:
            self._grad_norm = self._foreign_step(optimizer, divisor)
        found = self.scaler.found_inf(optimizer)
        self.scaler.update()
        self._applied = found is None or not found.item()
        for p in self._params():
            p.grad = None
        if self._sums is not None:
            self._sums.clear()
        self._backwards = 0
        self.global_steps += 1
        if not self._applied:
            self._skipped += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _fused_step(self, optimizer: Any, divisor: float, statistics: Tensor | None) -> Tensor | None:
        """Unscales, checks, clips and updates in one pass; where the statistics are known, in the only one over the
        gradients. Returns the gradients' norm."""
        optimizer._statistics = statistics
        try:
            with optimizer._scaled(None if divisor == 1.0 else torch.full((), divisor, device=self.device)):
                self.scaler.step(optimizer)
        finally:
            optimizer._statistics = None
        return optimizer.grad_norm

    def _foreign_step(self, optimizer: torch.optim.Optimizer, divisor: float) -> Tensor | None:
        """The same in passes of their own, for an optimizer that knows nothing of scales."""
        params = [p for p in self._params() if p.grad is not None]
        for p in params:
            p.grad_dtype = None
            p.grad = p.grad.float().div_(divisor)  # type: ignore[union-attr]
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if self.config.gradient_clipping:
            torch.nn.utils.clip_grads_with_norm_(params, self.config.gradient_clipping, norm)
        for p in params:
            p.grad = p.grad.to(p.dtype)  # type: ignore[union-attr]
        self.scaler.step(optimizer)
        return norm

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Micro-batches that are summed on this rank alone; gradients are reduced at the next ``step`` outside."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of this step, those already summed included."""
        self.module.zero_grad(set_to_none)
        if self._sums is not None:
            self._sums.clear()
        self._backwards = 0

    # What scripts ask.

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def was_step_applied(self) -> bool:
        """Whether the last optimizer step was applied, not skipped for an overflow."""
        return self._applied

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, unscaled, before clipping; inf or NaN where it was skipped."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def loss_scale(self) -> float:
        return self.scaler.get_scale()

    @property
    def skipped_steps(self) -> int:
        return self._skipped

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def global_rank(self) -> int:
        return self.rank

    @property
    def global_samples(self) -> int:
        """Samples in all optimizer steps so far."""
        return self.global_steps * self.train_batch_size()

    def fp16_enabled(self) -> bool:
        return self.dtype == torch.float16

    def bfloat16_enabled(self) -> bool:
        return self.dtype == torch.bfloat16

    def zero_optimization(self) -> bool:
        """Whether states are sharded: not built yet."""
        return False

    def zero_optimization_stage(self) -> int:
        return 0

    def train_batch_size(self) -> int:
        return self.config.batch_triple()[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.batch_triple()[1]

    def gradient_accumulation_steps(self) -> int:
        return self.config.batch_triple()[2]

    # Checkpoints.

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
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()  # sums in progress are not saved
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


_REPLACED: dict[type, type[Optimizer]] = {
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
    torch.optim.SGD: optim.SGD,
}


def _replacement(theirs: torch.optim.Optimizer) -> Optimizer:
    """Ours in the place of torch's: its very group dicts and hooks, so whoever steers it goes on doing so."""
    ours_class = _REPLACED[type(theirs)]
    name = ours_class.__name__
    log.warning("torch.optim.%s is replaced by deepfast.%s: the same update, in one pass", name, name)
    taken = inspect.signature(ours_class).parameters.keys() - {"fused", "foreach"}
    for group in theirs.param_groups:
        group["fused"] = group["foreach"] = None
    ours = ours_class(theirs.param_groups, **{k: v for k, v in theirs.defaults.items() if k in taken})
    ours._optimizer_step_pre_hooks = theirs._optimizer_step_pre_hooks
    ours._optimizer_step_post_hooks = theirs._optimizer_step_post_hooks
    theirs._opt_called = True  # type: ignore[attr-defined]  # so that its scheduler does not miss its steps
    return ours


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
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: dict[str, Any] | str | os.PathLike[str] | Config | None = None,
    mesh_param: Any = None,
    config_params: dict[str, Any] | str | None = None,
) -> tuple[Engine, torch.optim.Optimizer, DataLoader[Any] | None, Any]:
    """DeepSpeed's entry point: ``engine, optimizer, dataloader, lr_scheduler = deepfast.initialize(...)``.

    Args:
        args: an object whose ``deepspeed_config`` names the configuration, if ``config`` is not given.
        model: the module to train; moved to this rank's device, its weights cast to the configured type.
        optimizer: an optimizer, or a function of the parameters that makes one; None: as configured.
        model_parameters: parameters or groups for an optimizer that is made here; None: all of the model's.
        training_data: a dataset, for which a loader of micro-batches is made (each rank sees its own share).
        lr_scheduler: a scheduler, or a function of the optimizer that makes one; None: as configured.
        dist_init_required: False leaves torch.distributed alone; otherwise it is started where torchrun has launched
            the process.
        collate_fn: the loader's.
        config: a dict, the path of a JSON file, or a :class:`deepfast.config.Config`.
        distributed_port, mpu, mesh_param: model parallelism is not built: only the defaults are accepted.

    Raises:
        ConfigError: for a configuration that cannot be used, a batch triple that does not multiply included.
    """
    if model is None:
        raise ValueError("initialize(): model is missing")
    if mpu is not None or mesh_param is not None:
        raise ValueError("initialize(): model parallelism (mpu, mesh_param) is not built yet")
    given = config if config is not None else config_params
    if given is None:
        given = getattr(args, "deepspeed_config", None)
    if given is None:
        raise ConfigError("initialize(): no configuration: pass config= a dict or the path of a JSON file")
    if dist_init_required is False:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    else:
        device = init_distributed()
    if not isinstance(given, Config):
        given = configuration.load(given if isinstance(given, dict) else configuration.read_json(given))
    configuration.resolve_batch(given, dist.get_world_size() if dist.is_initialized() else 1)
    engine = Engine(model, optimizer, model_parameters, given, device, lr_scheduler)
    loader: DataLoader[Any] | None = None
    if training_data is not None:
        whole = isinstance(training_data, torch.utils.data.IterableDataset)  # deals itself out, or not at all
        sampler: Any = DistributedSampler(training_data) if engine.world_size > 1 and not whole else None
        loader = DataLoader(
            training_data,
            batch_size=engine.train_micro_batch_size_per_gpu(),
            shuffle=sampler is None and not whole,
            sampler=sampler,
            collate_fn=collate_fn,
            drop_last=given.dataloader_drop_last,
        )
    return engine, engine.optimizer, loader, engine.lr_scheduler
