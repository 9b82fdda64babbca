"""What an engine tells of its steps: a line now and then, events for monitors, how long its phases take."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from deepfast.engine.config import Config
from deepfast.engine.monitors import Event, Monitor
from deepfast.engine.timers import Throughput, Timers

log = logging.getLogger("deepfast")

PHASES = {"fwd": "forward", "bwd": "backward", "step": "step"}  # DeepSpeed's names of timers: of events


class Progress:
    """Rank 0 tells; what nobody wants to hear is neither computed nor waited for.

    Args:
        rank: in the group of all ranks, which make one together.
        device: where the engine computes.

    Attributes:
        monitor: see :class:`Monitor`.
        timers: the engine's are "fwd", "bwd" and "step", with ``wall_clock_breakdown``, and begin anew with each step.
        throughput: see :class:`Throughput`.
        phases: milliseconds that forward, backward and step took in the last step, by the names of those timers.
    """

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        self._first = rank == 0
        self._breakdown = config.wall_clock_breakdown
        self._every = config.steps_per_print or (1 if self._breakdown else None)
        self.monitor = Monitor(config)
        self.timers = Timers(device)
        self.throughput = Throughput(config.batch_triple()[0])
        self.phases: dict[str, float] = {}
        self._since: dict[str, float] = dict.fromkeys(PHASES, 0.0)  # the last line, added up
        self._steps = 0  # since then
        self._wants_loss = self._first and (self.monitor.enabled or self._every is not None)
        self._loss: Tensor | None = None  # the sum of what backward was given
        self._losses = 0

    def forward(self, training: bool) -> contextlib.AbstractContextManager[None]:
        """Within: a forward pass; one that is no training is not timed."""
        return self._phase("fwd") if training else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> contextlib.AbstractContextManager[None]:
        """Within: a backward pass from this, not yet scaled."""
        if not self.throughput.started:
            self.throughput.start()
        if self._wants_loss:
            value = loss.detach().float()
            self._loss = value.clone() if self._loss is None else self._loss + value
            self._losses += 1
        return self._phase("bwd")

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Within: reduction and optimizer step."""
        return self._phase("step")

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.timers.during(name) if self._breakdown else contextlib.nullcontext()

    def stepped(self, engine: Any) -> None:
        """After an optimizer step, skipped or not, when the engine has counted it."""
        self.throughput.batch_size = engine.train_batch_size()
        self.throughput.stop(global_step=True)
        self.throughput.start()
        if self._breakdown:
            self.phases = {name: self.timers(name).elapsed() for name in PHASES}
            self._since = {name: self._since[name] + self.phases[name] for name in PHASES}
        self._steps += 1
        due = self._every is not None and engine.global_steps % self._every == 0
        if self._first and (due or self.monitor.enabled):
            loss = None if self._loss is None else float(self._loss) / self._losses
            if self.monitor.enabled:
                self.monitor.write_events(self._events(engine, loss))
            if due:
                _say(self._line(engine, loss))
        self._loss, self._losses = None, 0
        if due:
            self._since, self._steps = dict.fromkeys(PHASES, 0.0), 0

    def _events(self, engine: Any, loss: float | None) -> list[Event]:
        values = {
            "train_loss": loss,
            "lr": engine.get_lr()[0],
            "loss_scale": engine.scaler.get_scale() if engine.scaler.is_enabled() else None,
            "grad_norm": engine.get_global_grad_norm(),
            "skipped_steps": engine.skipped_steps,
            **{f"elapsed_time_ms_{PHASES[name]}": time for name, time in self.phases.items()},
        }
        x = engine.global_samples
        return [(f"Train/Samples/{name}", value, x) for name, value in values.items() if value is not None]

    def _line(self, engine: Any, loss: float | None) -> str:
        rates = list(dict.fromkeys(f"{lr:.6g}" for lr in engine.get_lr()))
        parts = [
            f"step={engine.global_steps}",
            f"skipped={engine.skipped_steps}",
            f"lr=[{', '.join(rates[:4])}{', ...' if len(rates) > 4 else ''}]",
            *([] if loss is None else [f"loss={loss:.6g}"]),
            f"samples/s={self.throughput.recent():.4g}",
            *([f"loss_scale={engine.scaler.get_scale():.10g}"] if engine.scaler.is_enabled() else []),
        ]
        if self._breakdown:
            parts.append("ms: " + ", ".join(f"{name}={self._since[name] / self._steps:.2f}" for name in PHASES))
        return ", ".join(parts)

    def close(self) -> None:
        self.monitor.close()


def _say(line: str) -> None:
    """To the log, or on stdout where that would not show it: who sets ``steps_per_print`` wants to see it."""
    if log.isEnabledFor(logging.INFO):
        log.info(line)
    else:
        print(line, flush=True)
