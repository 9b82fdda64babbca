"""How long things take: named timers, and samples a second, with DeepSpeed's names."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Timer:
    """Adds up the times from ``start`` to ``stop``; on a GPU between events, waited for when they are read.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self) -> None:
        """Raises RuntimeError if it runs already."""
        if self._began is not None:
            raise RuntimeError("a timer was started that runs already: stop() it first")
        self._began = self._now()

    def stop(self) -> None:
        """Raises RuntimeError if it does not run."""
        if self._began is None:
            raise RuntimeError("a timer was stopped that does not run: start() it first")
        self._spans.append((self._began, self._now()))
        self._began = None

    def reset(self) -> None:
        """Stops it, and forgets what it has added up."""
        self._began = None
        self._spans.clear()

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds since the last reset, those of a timer that runs included; which it goes on doing."""
        runs = self._began is not None
        if runs:
            self.stop()
        total = sum(_milliseconds(*span) for span in self._spans)
        if reset:
            self._spans.clear()
        if runs:
            self.start()
        return total


def _milliseconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return 1e3 * (ended - began)
    ended.synchronize()
    return began.elapsed_time(ended)


class Timers:
    """``timers(name)`` is the timer of that name, made when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        if name not in self._timers:
            self._timers[name] = Timer(self._device)
        return self._timers[name]

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Times what is done within."""
        timer = self(name)
        timer.start()
        try:
            yield
        finally:
            timer.stop()


class Throughput:
    """Samples a second by the host's clock, which runs from step to step: what a loop does between them counts.

    The device is not waited for: over many steps the host is no faster than it.

    Args:
        batch_size: samples of an optimizer step, over all ranks.
        start_step: so many steps, in which things are compiled and allocated, do not count.
    """

    def __init__(self, batch_size: int, start_step: int = 2) -> None:
        self.batch_size = batch_size
        self._unheeded = start_step
        self._began: float | None = None
        self._seconds, self._samples = 0.0, 0
        self._recent_seconds, self._recent_samples = 0.0, 0
        self.epoch_count = 0

    @property
    def started(self) -> bool:
        return self._began is not None

    def start(self) -> None:
        """The clock runs, from now on: what was before does not count."""
        self._began = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """Ends what ``start`` has begun, without effect if nothing has.

        Args:
            global_step: an optimizer step has ended, and its samples count.
            report_speed: no effect: ``steps_per_print`` reports.
        """
        if self._began is None:
            return
        seconds, self._began = time.perf_counter() - self._began, None
        samples = self.batch_size if global_step else 0
        self._recent_seconds += seconds
        self._recent_samples += samples
        if self._unheeded:
            self._unheeded -= global_step
            return
        self._seconds += seconds
        self._samples += samples

    def update_epoch_count(self) -> None:
        """DeepSpeed's: an epoch has ended."""
        self.epoch_count += 1

    def avg_samples_per_sec(self) -> float:
        """Over all steps but the first two; 0 before there are any."""
        return self._samples / self._seconds if self._samples else 0.0

    def recent(self) -> float:
        """Since the last call, the first steps included; 0 if there were none."""
        samples, seconds = self._recent_samples, self._recent_seconds
        self._recent_seconds, self._recent_samples = 0.0, 0
        return samples / seconds if samples else 0.0
