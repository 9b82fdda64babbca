"""The engine: forward, backward, step, and what scripts ask of it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepfast.engine import schedule
from deepfast.engine.boxes import run_of
from deepfast.engine.config import Config
from deepfast.engine.optimizer import choose
from deepfast.engine.precision import Precision, loss_scaler
from deepfast.engine.progress import Progress
from deepfast.engine.reduction import Reduction
from deepfast.engine.resume import Resumable
from deepfast.engine.skips import Skips
from deepfast.engine.statistics import GradientStatistics
from deepfast.engine.sums import GradientSums
from deepfast.optim import Optimizer
from deepfast.optim.state import HALF

log = logging.getLogger("deepfast")


class Engine(Resumable):
    """Trains a module; made by :func:`initialize`.

    A training step is ``loss = engine(batch); engine.backward(loss); engine.step()`` for each micro-batch; every
    ``gradient_accumulation_steps`` of them the optimizer steps.

    Attributes:
        module: the module that was given, its weights in the configured type.
        optimizer, lr_scheduler, scaler: what a step calls; the scheduler only moves on when a step was applied.
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
        self.config = config
        self.device = device
        self.module = module
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._forward = Precision.of(config, module, device)
        self.dtype = self._forward.dtype
        if self.world_size > 1:
            for t in (*module.parameters(), *module.buffers(), *self._forward.originals.values()):
                dist.broadcast(t.data, 0)
        self._own_optimizer, self._own_scheduler = optimizer is None, lr_scheduler is None
        parameters = module.parameters() if parameters is None else parameters
        self.optimizer = choose(optimizer, parameters, config, self.dtype)
        self._sharded = {}
        self.lr_scheduler = lr_scheduler(self.optimizer) if callable(lr_scheduler) else lr_scheduler
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule.from_config(config, self.optimizer)
        elif isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("initialize(): ReduceLROnPlateau needs a metric: keep it yourself and step it with one")
        self.scaler = loss_scaler(config, device)
        _, _, accumulation = config.batch_triple()
        self._reduction = Reduction(self._params(), self.optimizer, self._stage(), accumulation)
        self._note_parts()
        self._start_masters()
        self._backwards = 0  # since the last step
        self._sync = True
        self._applied = False
        self._skipped = 0
        self._grad_norm: Tensor | None = None
        self.global_steps = 0
        self.micro_steps = 0
        self._skips = Skips(config)
        self._progress = told = Progress(config, self.rank, device)
        self.monitor, self.timers, self.tput_timer = told.monitor, told.timers, told.throughput

    def _stage(self) -> int:
        stage = self.config.zero_optimization.stage
        if stage > 2:
            log.warning(
                "zero_optimization.stage=3 is not built yet: stage 2 is taken, and weights are whole on every rank"
            )
        return min(stage, 2)

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

    def _note_parts(self) -> None:
        shards = self._reduction.shards
        self._sharded = {} if shards is None else {part.mine: part for part in shards.parts.values()}
        ours = isinstance(self.optimizer, Optimizer) and self._sums is None
        self._statistics = GradientStatistics(self._params(), self.optimizer.backend) if ours else None  # type: ignore[attr-defined]

    @property
    def _sums(self) -> Any:
        return self._reduction.sums

    # One step.

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        with self._progress.forward(self.training):
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
        if self._backwards == 0 and self._reduction.heed(self._params()):
            self._note_parts()
        if self._sums is None and self._backwards and self.dtype in HALF:
            self._reduction.sums = GradientSums(self._params())  # a second loss in one step: from here on, sum in fp32
            self._reduction.sums.begin(None, last=False)
            self._reduction.sums.add()
        self._backwards += 1
        last = self._sync and self.is_gradient_accumulation_boundary()
        if self._sums is not None:
            self._sums.begin(None if weight is None else float(weight), last, self._sync)
        elif self._statistics is not None:
            self._statistics.begin()
        with self._reduction.naming(), self._progress.backward(loss):
            self.scaler.scale(loss).backward()
            if self._sums is not None:
                self._sums.add()
        if self._sums is None and self._statistics is not None:
            self._statistics.end()
        return loss

    def step(self) -> None:
        """At a gradient accumulation boundary, reduces the gradients and steps the optimizer; before it, only counts.

        Raises:
            RuntimeError: inside ``no_sync``, and at a boundary without a ``backward`` before it.
            LossScaleError: after ``fp16.max_skips_at_minimum`` skipped steps in a row at the lowest scale.
        """
        if not self._sync:
            raise RuntimeError("step() must not be called inside no_sync()")
        if self.is_gradient_accumulation_boundary():
            if self._backwards == 0:
                raise RuntimeError("step(): there was no backward() since the last optimizer step")
            with self._reduction.naming(), self._progress.step():
                self._optimizer_step()
            self._progress.stepped(self)
        self.micro_steps += 1
        self._skips.check()

    def _optimizer_step(self) -> None:
        optimizer, shards = self.optimizer, self._reduction.shards
        divisor, statistics = 1.0, None
        if shards is not None:
            shards.check()
        if self._sums is not None:
            statistics = self._sums.finish()
            divisor = self._sums.divisor(self.gradient_accumulation_steps() * self.world_size)
            self._reduction.hand_over()
        elif self._statistics is not None:
            statistics = self._statistics.take()
        if isinstance(optimizer, Optimizer):
            self._grad_norm = self._fused_step(optimizer, divisor, statistics)
        else:
            self._grad_norm = self._foreign_step(optimizer, divisor)
        if shards is not None:
            shards.spread(optimizer._sent)  # type: ignore[attr-defined]
        self._applied = self._skips.settle(self, self._grad_norm)
        for part in self._parts():
            part.whole.grad = part.mine.grad = None
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
    def nonfinite_steps(self) -> int:
        """Steps since this engine was made whose inf or NaN gradients nothing skipped: without loss scaling."""
        return self._skips.nonfinite.count()

    def steps_per_print(self) -> int | None:
        return self.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        return self.config.wall_clock_breakdown

    def get_wall_clock_timers(self) -> dict[str, float]:
        """Milliseconds of the last step's "fwd", "bwd" and "step"; empty without ``wall_clock_breakdown``."""
        return dict(self._progress.phases)

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
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """0: every rank keeps the whole state of the optimizer; 1 and 2: a part of it (and of the gradients' sums)."""
        return min(self.config.zero_optimization.stage, 2)

    def train_batch_size(self) -> int:
        return self.config.batch_triple()[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.batch_triple()[1]

    def gradient_accumulation_steps(self) -> int:
        return self.config.batch_triple()[2]
