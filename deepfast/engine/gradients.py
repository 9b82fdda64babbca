"""One step's gradients: backward passes add to them, whoever begins these, and the optimizer's step takes them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from deepfast.engine import by_hand
from deepfast.engine.parts import Part
from deepfast.engine.reduction import Reduction
from deepfast.engine.statistics import GradientStatistics
from deepfast.engine.sums import GradientSums
from deepfast.optim import Optimizer
from deepfast.optim.state import HALF
from deepfast.scaler import LossScaler

if TYPE_CHECKING:
    from deepfast.engine.units import Units


class Pass(NamedTuple):
    """A backward pass that an engine was asked for; other engines may have computed a part of its loss."""

    weight: float | None
    times: float
    scale: Tensor | None  # which the loss was multiplied by


_running: list[Pass] = []


class Gradients:
    """What backward passes have left since the last step: in ``p.grad``, or summed over micro-batches and ranks.

    Where ``p.grad`` is not what the step takes (sums, a loss scale) a stand-in lies there between passes, which
    refuses all use (``by_hand.py``).

    Args:
        optimizer: its parameters become this rank's parts where the engine is sharded.
        scaler: with which losses are multiplied.
        stage: of ZeRO.
        accumulation: micro-batches a step.
        units: of a module in parts (stage 3).

    Attributes:
        count: backward passes since the last step.
        position: micro-batches of this step that ``step`` was called for.
        boundary: whether the next ``step`` is to step; None: as counted.
        sync: not inside ``no_sync``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        dtype: torch.dtype,
        stage: int,
        accumulation: int,
        units: Units | None = None,
    ) -> None:
        self.optimizer, self.scaler, self.dtype = optimizer, scaler, dtype
        self._scales = scaler.is_enabled() and dtype == torch.float16  # else it only looks for what is not finite
        self.accumulation = accumulation
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._sharded: dict[Tensor, Part] = {}
        self.reduction = Reduction(self.params(), optimizer, stage, accumulation, units)
        self._note_parts()
        self.count = self.position = 0
        self.boundary: bool | None = None
        self.sync = True
        self._own = False  # this engine was asked for the backward pass that runs
        self._task: int | None = None  # autograd's number of the last pass that somebody else began
        self._scaled = False  # somebody has asked for a scaled loss
        self._stray: Pass | None = None  # one that has left gradients here, and that this engine was not asked for
        self._finished: tuple[float, Tensor | None] | None = None
        self._rewritten = False  # by hand, since their statistics were taken
        self._held: dict[Tensor, Tensor] = {}  # whose stand-in is there
        self._covered: list[Tensor] = []
        self._stand_ins: dict[Tensor, Tensor] = {}

    @property
    def sums(self) -> Any:
        return self.reduction.sums

    def parts(self) -> list[Part]:
        """This rank's part of each parameter that the optimizer steps, in the order of its groups."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [self._sharded.get(p) or Part.all_of(p) for p in held]

    def params(self) -> list[Tensor]:
        return [part.whole for part in self.parts()]

    def _note_parts(self) -> None:
        shards, optimizer = self.reduction.shards, self.optimizer
        self._sharded = {} if shards is None else {part.mine: part for part in shards.parts.values()}
        self._by_whole = {part.whole: part for part in self.parts()}
        by_hand.note(self, self._by_whole)
        ours = isinstance(optimizer, Optimizer) and self.sums is None
        self._statistics = GradientStatistics(self.params(), optimizer.backend) if ours else None  # type: ignore[attr-defined]

    def at_boundary(self) -> bool:
        return self.position + 1 >= self.accumulation if self.boundary is None else self.boundary

    # A backward pass.

    def backward(self, loss: Tensor, weight: float | None, times: float, retain_graph: bool) -> None:
        """Of the scaled loss. weight, times: as of :meth:`begin`."""
        self._adopt()
        self.begin(weight, times)
        scaled = self.scaler.scale(loss)
        _running.append(Pass(weight, times, self.scaler._used if self._scales else None))
        self._own = True
        try:
            with self.reduction.naming():
                scaled.backward(retain_graph=retain_graph)
                self.end()
            self._cover()
        finally:
            self._own = False
            _running.pop()

    def scale(self, loss: Tensor) -> Tensor:
        """A loss whose ``backward()`` is called by hand."""
        self._scaled = True
        return self.scaler.scale(loss)

    def watch(self, outputs: Any) -> None:
        """Notices a backward pass through what a forward pass has returned, where this engine is not asked for it."""
        for t in _tensors(outputs):
            if t.grad_fn is not None:
                t.register_hook(self._flows)

    def _flows(self, _: Tensor) -> None:
        """Autograd has come to an output of the forward pass, on its way to the parameters."""
        task = torch._C._current_graph_task_id()
        if self._own or task == self._task or not self._reached():
            return
        self._task = task
        if _running:
            self._stray = _running[-1]
            if (self._stray.scale is None) == self._scales:
                raise RuntimeError("backward(): the engines that a loss has come through need the same precision")
        else:
            self._check_scaled()
            self._stray = Pass(None, 1.0, self.scaler._used if self._scales else None)
        self._uncover(back=self.sums is None)
        if self.sums is not None:
            self.sums.expect(self._stray.weight, self._stray.times)

    def _reached(self) -> bool:
        """Whether the pass that runs computes gradients of parameters. (``torch.autograd.grad`` may not.)"""
        nodes = (get_gradient_edge(p).node for p in self.params() if p.requires_grad)
        return any(torch._C._will_engine_execute_node(node) for node in nodes)

    def _check_scaled(self) -> None:
        scaled, self._scaled = self._scaled, False
        if self._scales and not scaled:
            raise RuntimeError(
                "loss.backward(): under fp16 a loss is scaled: engine.backward(loss) or engine.scale(loss).backward()"
            )

    def fold(self) -> None:
        """Before a step: what is there of passes that this engine was not asked for is a micro-batch's gradients.

        Until then it lies in ``p.grad``, as in torch: a discriminator may drop what its generator's loss has left.
        """
        known = self._by_whole if self.count else self.params()
        if (self.sums is None and self.count) or not any(map(self._is_there, known)):
            return
        stray = self._stray
        if stray is None:
            self._check_scaled()
            stray = Pass(None, 1.0, None)
        if stray.scale is not None:
            self.scaler._used = stray.scale
        self._stray = None
        self.begin(stray.weight, stray.times)
        self.end()

    @staticmethod
    def _is_there(p: Tensor) -> bool:
        return p.grad is not None and not by_hand.is_stand_in(p.grad)

    def _adopt(self) -> None:
        """Gradients that another engine's loss has left here come under this engine's scale."""
        stray, self._stray = self._stray, None
        if stray is None or stray.scale is None or not self._scales:
            return
        grads = [p.grad for p in self.params() if p.grad is not None]
        if grads and not self.count:
            torch._foreach_mul_(grads, float(self.scaler.get_scale() / stray.scale))

    def begin(self, weight: float | None = None, times: float = 1.0) -> None:
        """Before it.

        Args:
            weight: its micro-batch's share of the step, normalized over the step and the ranks.
            times: without a weight: its micro-batch counts so many times ``1 / accumulation``.
        """
        if self.count == 0 and self.reduction.heed(self.params()):
            self._note_parts()
        self._uncover(back=self.sums is None)
        if self.sums is None and (self.accumulation > 1 or (self.count and self.dtype in HALF)):
            self._start_sums()
        self.count += 1
        self._finished = None
        if self.sums is not None:
            self.sums.begin(weight, self.sync and self.at_boundary(), self.sync, times)
        elif self._statistics is not None:
            self._statistics.begin()

    def end(self) -> None:
        """After it."""
        if self.sums is not None:
            self.sums.add()
        elif self._statistics is not None:
            self._statistics.end()

    def _start_sums(self) -> None:
        """More micro-batches a step than before, or a second 16-bit loss in one: from here on, sum in fp32."""
        self.reduction.sums = GradientSums(self.params())
        self._note_parts()
        if self.count:
            self.sums.begin(None, last=False)
            self.sums.add()

    # The step.

    def take(self) -> tuple[float, Tensor | None]:
        """Puts the sums, or this rank's parts of them, where the optimizer looks. All ranks call it.

        Returns:
            What they are to be divided by, and their statistics (fp64 [2]; None: not known).

        Raises:
            RuntimeError: if there are none.
        """
        if self.count == 0:
            raise RuntimeError("step(): there was no backward() since the last optimizer step")
        divisor, statistics = self._finish()
        self._uncover()
        if self._rewritten:
            shards = self.reduction.shards
            statistics = None if shards is None else shards.statistics([part.mine.grad for part in self.parts()])
        return divisor, statistics

    def _finish(self) -> tuple[float, Tensor | None]:
        if self._finished is None:
            divisor, statistics = 1.0, None
            self._uncover()
            if self.sums is not None:
                statistics = self.sums.finish()
                divisor = self.sums.divisor(self.accumulation * self._ranks)
                self.reduction.hand_over()
            elif self._statistics is not None:
                statistics = self._statistics.take()
            self._finished = divisor, statistics
        return self._finished

    def clear(self) -> None:
        """Forgets them."""
        self._covered, self._held = [], {}
        for part in self.parts():
            part.whole.grad = part.mine.grad = None
        if self.sums is not None:
            self.sums.clear()
        self.count, self._finished, self._rewritten = 0, None, False
        self._scaled, self._stray = False, None

    def close(self) -> None:
        """Gives up the ranks' common memory: the weights move to memory of their own."""
        self.clear()
        self.reduction.close()

    # By hand.

    def _cover(self) -> None:
        """Puts a stand-in wherever ``p.grad`` is not, or not yet, what the step takes."""
        if self.sums is None and not self._scales:
            return
        if self.sums is None:
            covered = [p for p in self.params() if p.grad is not None]
        else:
            covered = [p for p, there in zip(self.sums.params, self.sums.present, strict=True) if there]
        for p in covered:
            if p.grad is not None:
                self._held[p] = p.grad
            by_hand.cover(p, self._stand_ins)
        self._covered = covered

    def _uncover(self, back: bool = True) -> None:
        """Takes the stand-ins away. back: what they stood for comes to their place."""
        for p in self._covered:
            if self._is_there(p):
                raise RuntimeError(by_hand.HOW)
            p.grad = self._held.get(p) if back else None
        self._covered, self._held = [], {}

    @contextlib.contextmanager
    def whole(self, p: Tensor) -> Iterator[tuple[Part, Tensor | None, Tensor | float]]:
        """Within: this rank's part of a parameter, the gradient that the step takes for it, and its divisor."""
        part = self._by_whole[p]
        divisor, _ = self._finish()
        self._uncover()
        home = part.mine.device
        try:
            yield part, part.mine.grad, divisor * (self.scaler._scale_used(home) if self._scales else 1.0)
        finally:
            self._cover()

    def rewritten(self) -> None:
        """Gradients were written by hand: what is known of them all is not true any more."""
        self._rewritten = True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(vars(value))
