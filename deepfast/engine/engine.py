"""The engine: forward, backward, step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepfast.engine import born, schedule
from deepfast.engine.asked import Asked
from deepfast.engine.boxes import run_of
from deepfast.engine.config import Config
from deepfast.engine.gradients import Gradients
from deepfast.engine.optimizer import choose
from deepfast.engine.precision import Precision, loss_scaler
from deepfast.engine.progress import Progress
from deepfast.engine.reduction import communicator
from deepfast.engine.skips import Skips
from deepfast.errors import ConfigError
from deepfast.optim import Optimizer
from deepfast.optim.shards import is_unit

log = logging.getLogger("deepfast")


class Engine(Asked):
    """Trains a module; made by :func:`initialize`.

    A training step is ``loss = engine(batch); engine.backward(loss); engine.step()`` for each micro-batch; every
    ``gradient_accumulation_steps`` of them the optimizer steps. Attributes that it lacks are the module's.

    Attributes:
        module: the module that was given, its weights in the configured type.
        optimizer, lr_scheduler, scaler: what a step calls; the scheduler only moves on when a step was applied. Without
            an optimizer (None) the engine only runs forward.
        config: what was given as the configuration, as a dict.
        device: where the module is.
        global_steps: optimizer steps so far, skipped ones included.
        micro_steps: micro-batches so far.
        monitor: ``write_events([(name, value, step)])`` where ``monitor.enabled``, as in DeepSpeed.
        timers: ``timers(name)`` has ``start``, ``stop`` and ``elapsed``.
        tput_timer: ``avg_samples_per_sec`` of the steps so far.
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
        if not isinstance(config, Config):
            raise TypeError("an Engine is made by deepfast.initialize(), which reads the configuration")
        self._config = config
        self.config = config.given()
        self.device = device
        self.module = module
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        in_parts = self._in_parts(module)
        if not in_parts and born.any_in(module):
            born.make_whole(module, device)
        self._forward = Precision.of(config, module, device, in_parts)
        self.dtype = self._forward.dtype
        if self.world_size > 1:
            weights = () if in_parts else (*module.parameters(), *self._forward.originals.values())
            for t in (*module.buffers(), *weights):
                dist.broadcast(t.data, 0)
        if in_parts:
            optimizer, parameters = self._take_apart(optimizer, parameters)
        self.scaler = loss_scaler(config, device)
        self._applied = False
        self._dropped = False  # micro-batches, and that was said
        self._skipped = 0
        self._grad_norm: Tensor | None = None
        self.global_steps = 0
        self.micro_steps = 0
        self._skips = Skips(config)
        self._progress = told = Progress(config, self.rank, device)
        self.monitor, self.timers, self.tput_timer = told.monitor, told.timers, told.throughput
        if optimizer is None and config.optimizer is None and "optimizer" not in config._auto:
            self._forward.originals.clear()
            return
        self._own_optimizer, self._own_scheduler = optimizer is None, lr_scheduler is None
        parameters = module.parameters() if parameters is None else parameters
        self.optimizer = choose(optimizer, parameters, config, self.dtype)
        own = set(module.parameters())
        if own.isdisjoint(p for group in self.optimizer.param_groups for p in group["params"]):
            log.warning("the optimizer has no parameter of the model: was it made of another one, or before a copy?")
        if self.fp16_enabled():
            self.optimizer.loss_scaler = self.scaler  # type: ignore[attr-defined] # where DeepSpeed's scripts look
        self.lr_scheduler = lr_scheduler(self.optimizer) if callable(lr_scheduler) else lr_scheduler
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule.from_config(config, self.optimizer)
        elif not hasattr(self.lr_scheduler, "step"):
            what = type(self.lr_scheduler).__name__
            raise ConfigError(
                f"initialize(): lr_scheduler= takes a scheduler, or a function that makes one, not {what}"
            )
        elif isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("initialize(): ReduceLROnPlateau needs a metric: keep it yourself and step it with one")
        accumulation = config.batch_triple()[2]
        stage = config.zero_optimization.stage
        self._gradients = Gradients(self.optimizer, self.scaler, self.dtype, stage, accumulation, self._units)
        self._start_masters()

    def _in_parts(self, module: nn.Module) -> bool:
        """Whether each rank is to have a part of each weight: at stage 3, or because the caller has cut them."""
        stage, by_caller = self._config.zero_optimization.stage, any(map(is_unit, module.modules()))
        if by_caller and stage in (1, 2):
            raise ConfigError(f"zero_optimization.stage={stage}: fully_shard has cut the module already: set it to 3")
        return by_caller or (stage == 3 and self.world_size > 1)

    def _take_apart(self, optimizer: Any, parameters: Any) -> tuple[Any, Any]:
        """Cuts the module's weights; returns the optimizer and the parameters, which then have the parts."""
        from deepfast.engine.units import Units  # FSDP takes its time

        smallest = self._config.zero_optimization.stage3_param_persistence_threshold
        parameters = None if parameters is None else list(parameters)
        self._units = units = Units(self.module, self.dtype, self.device, smallest, communicator())
        self._forward.originals.update(units.originals)
        if isinstance(optimizer, torch.optim.Optimizer):
            units.renew(optimizer)
        return optimizer, None if parameters is None else units.renewed(parameters)

    def _start_masters(self) -> None:
        """From what the weights were before they were cast to 16 bits."""
        originals, optimizer = self._forward.originals, self.optimizer
        if not isinstance(optimizer, Optimizer):
            originals.clear()
            return
        for part in self._parts():
            value = originals.pop(part.whole, None)
            if value is not None and part.mine.requires_grad and optimizer.keeps_master(part.mine):
                own = run_of(value, part.whole, part.begin, part.end) if part.sharded else value
                optimizer.set_master(part.mine, own)
        originals.clear()

    # One step.

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        with self._progress.forward(self.training):
            outputs = self._forward(*inputs, **kwargs)
        if self._gradients is not None and torch.is_grad_enabled():
            self._gradients.watch(outputs)
        return outputs

    def backward(
        self,
        loss: Tensor,
        weight: float | Tensor | None = None,
        *,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
    ) -> Tensor:
        """Backpropagates the scaled loss and adds the gradients to this step's.

        ``loss.backward()`` does the same where the loss comes from what the engine has returned; under fp16 it is
        ``engine.scale(loss).backward()``. A loss may come through several engines: all that it reaches are to step.

        Args:
            loss: a scalar, the mean over its micro-batch.
            weight: this micro-batch's share (its number of tokens, say), normalized over the step and the ranks.
                Without it, each micro-batch counts 1 / gradient_accumulation_steps.
            retain_graph: as of :meth:`torch.Tensor.backward`.
            scale_wrt_gas: False: the loss is divided by the accumulation already.

        Returns:
            The loss divided by the accumulation (undivided where ``scale_wrt_gas`` is False), without its graph.

        Raises:
            RuntimeError: if some micro-batches of a step have a weight and others not; for a loss without a graph;
                without an optimizer.
            TypeError: for a loss that is no tensor, and a weight that is no number.
            ValueError: for a loss of several elements, and a negative weight.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"backward(): a loss is a tensor, not {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"backward(): a loss is a scalar, not of shape {tuple(loss.shape)}: take its mean")
        if not loss.requires_grad:
            raise RuntimeError("backward(): the loss has no graph: was it computed under no_grad, or detached?")
        if isinstance(weight, bool) or not (weight is None or hasattr(weight, "__float__")):
            what = type(weight).__name__
            raise TypeError(f"backward(): a weight is a number, not a {what}; retain_graph= is a keyword")
        if weight is not None and not float(weight) >= 0:
            raise ValueError(f"backward(): a weight must not be negative, got {float(weight)}")
        if weight is not None and not scale_wrt_gas:
            raise ValueError("backward(): weight= is normalized over the step: leave out scale_wrt_gas=False")
        accumulation = self.gradient_accumulation_steps()
        times = 1.0 if scale_wrt_gas else float(accumulation)
        gradients = self._trained()
        with self._progress.backward(loss):
            gradients.backward(loss, None if weight is None else float(weight), times, retain_graph)
        return loss.detach() / accumulation if scale_wrt_gas else loss.detach()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale: ``engine.scale(loss).backward()``, then ``engine.step()``."""
        return self._trained().scale(loss)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At a gradient accumulation boundary, reduces the gradients and steps the optimizer; before it, only counts.

        Args:
            lr_kwargs: for the scheduler's ``step``.

        Raises:
            RuntimeError: inside ``no_sync``, and at a boundary without a ``backward`` before it.
            LossScaleError: after ``fp16.max_skips_at_minimum`` skipped steps in a row at the lowest scale.
        """
        gradients = self._trained()
        if not gradients.sync:
            raise RuntimeError("step() must not be called inside no_sync()")
        gradients.fold()
        if gradients.at_boundary():
            with gradients.reduction.naming(), self._progress.step():
                self._optimizer_step(gradients, lr_kwargs or {})
            gradients.position = 0
            self._progress.stepped(self)
        else:
            gradients.position += 1
        self.micro_steps += 1
        self._skips.check()

    def _optimizer_step(self, gradients: Gradients, lr_kwargs: dict[str, Any]) -> None:
        shards = gradients.reduction.shards
        optimizer: Any = self.optimizer
        if shards is not None:
            shards.check()
        divisor, statistics = gradients.take()
        if isinstance(optimizer, Optimizer):
            self._grad_norm = self._fused_step(optimizer, divisor, statistics)
        else:
            self._grad_norm = self._foreign_step(optimizer, divisor)
        if shards is not None:
            shards.spread(optimizer._sent)
        self._applied = self._skips.settle(self, self._grad_norm)
        gradients.clear()
        self.global_steps += 1
        if not self._applied:
            self._skipped += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)

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
        if self._config.gradient_clipping:
            torch.nn.utils.clip_grads_with_norm_(params, self._config.gradient_clipping, norm)
        for p in params:
            p.grad = p.grad.to(p.dtype)  # type: ignore[union-attr]
        self.scaler.step(optimizer)
        return norm

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Micro-batches that are summed on this rank alone; gradients are reduced at the next ``step`` outside."""
        gradients = self._trained()
        gradients.sync = False
        try:
            yield
        finally:
            gradients.sync = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of this step, those already summed included. Its micro-batches stay counted."""
        gradients = self._gradients
        if gradients is not None:
            if gradients.position and gradients.count and not self._dropped:
                self._dropped = True
                log.warning(
                    "zero_grad() in the middle of a step: the gradients of %d of its %d micro-batches are dropped; "
                    "they stay counted, as in DeepSpeed", gradients.position, gradients.accumulation
                )  # fmt: skip
            gradients.clear()
        self.module.zero_grad(set_to_none)
