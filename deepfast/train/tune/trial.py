"""One trial: ``python -m deepfast.train.tune.trial FOLDER``, alone or under torchrun, trains a few steps.

What is to be trained stands in ``FOLDER/request.json``; each rank leaves how it went in ``FOLDER/rank<n>.json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepfast.engine import checkpoint
from deepfast.engine import config as configuration
from deepfast.engine.config import Config
from deepfast.engine.ranks import init_distributed, launched, of_rank_0
from deepfast.engine.timers import Timer
from deepfast.errors import TrainingError, UserError
from deepfast.train.defaults import trainer_defaults
from deepfast.train.stop import Stop
from deepfast.train.tune import memory

RUN = 4  # micro-batches of a step that are run: one of each kind, and two of those in the middle, which are all alike
WARM_UP = 2  # steps that are not counted
STEPS = 3  # that are, at least; but where these take LONG times what was asked for, as many as have been made
LONG = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be tried.

    Attributes:
        data: the configuration, as it was written.
        seconds: to measure for.
        memory: bytes that a rank may take; on a CPU its resident pages, on a GPU what it allocates there. None: all.
    """

    data: dict[str, Any]
    micro: int
    accumulation: int
    seconds: float
    memory: int | None


class Tokens:
    """Random ones in place of data, which need not be there yet: what a token is makes no step slower.

    They are asked for when a micro-batch begins: so it is known how long each of a step's takes, on a GPU, too.
    """

    def __init__(self, vocabulary: int, length: int, device: torch.device, beat: Path) -> None:
        self._vocabulary, self._length, self._device, self._beat = vocabulary, length, device, beat
        self._random = torch.Generator().manual_seed(0)
        self._timers: list[Timer] = []

    def batch(self, _: int, size: int) -> Tensor:
        """int64 [size, length]"""
        self._stop()
        self._beat.touch()
        self._timers.append(Timer(self._device))
        self._timers[-1].start()
        return torch.randint(self._vocabulary, (size, self._length), generator=self._random)

    def _stop(self) -> None:
        if self._timers:
            self._timers[-1].stop()

    def seconds(self) -> list[float]:
        """Of each micro-batch since the last call; the last of them has the optimizer's step with it."""
        self._stop()
        taken = [timer.elapsed() / 1e3 for timer in self._timers]
        self._timers.clear()
        return taken


def _quiet(config: Config) -> Config:
    """Nothing is written where runs are written."""
    for monitor in (config.tensorboard, config.csv_monitor, config.wandb):
        monitor.enabled = False
    config.steps_per_print, config.wall_clock_breakdown = None, False
    return config


def _engine(request: Request, beat: Path) -> tuple[Any, Tokens]:
    """The trainer's engine, for steps of RUN micro-batches at most."""
    from deepfast.train.loop import begun

    config = _quiet(trainer_defaults(configuration.load(request.data)))
    config.train_batch_size, config.train_micro_batch_size = None, request.micro
    config.gradient_accumulation_steps = min(request.accumulation, RUN)
    device = init_distributed()
    if request.memory is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request.memory / total), device)
    configuration.resolve_batch(config, launched()[1] or 1)
    engine, module, _ = begun(config)
    beat.touch()
    return engine, Tokens(module.config.vocab_size, config.train_sequence_length, engine.device, beat)


def _steps(engine: Any, tokens: Tokens, request: Request) -> list[float]:
    """Seconds of each measured optimizer step. What was left out of it took what those in the middle took in the mean.

    A step that the loss scaler skips is none, where others were made.
    """
    from deepfast.train.loop import one_step

    left_out = request.accumulation - engine.gradient_accumulation_steps()
    made: list[float] = []
    skipped: list[float] = []
    middle: list[float] = []
    stop = Stop()
    for _ in range(WARM_UP):
        one_step(engine, tokens, stop)
    tokens.seconds()
    began = time.perf_counter()
    enough = False
    while not enough:
        before, started = engine.skipped_steps, time.perf_counter()
        one_step(engine, tokens, stop)
        taken = time.perf_counter() - started
        (made if engine.skipped_steps == before else skipped).append(taken)
        middle += tokens.seconds()[1:-1]
        passed, count = time.perf_counter() - began, len(made) + len(skipped)
        enough = of_rank_0(passed >= request.seconds and (count >= STEPS or passed >= LONG * request.seconds))
    more = left_out * statistics.fmean(middle) if left_out else 0.0
    return [taken + more for taken in made or skipped]


def _trained(request: Request, beat: Path) -> dict[str, Any]:
    from deepfast.train.report import peak_memory

    engine, tokens = _engine(request, beat)
    seconds = _steps(engine, tokens, request)
    return {
        "step_seconds": statistics.median(seconds),
        "steps": len(seconds),
        "peak": peak_memory(engine.device),
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "dtype": str(engine.dtype).removeprefix("torch."),
    }


def _outcome(request: Request, beat: Path) -> dict[str, Any]:
    """The figures; or ``memory``, ``refused`` (whatever the micro-batch) or ``failed``, with the reason."""
    try:
        return _trained(request, beat)
    except Exception as error:  # whatever it is, it is for who has asked to judge
        traceback.print_exc()
        if memory.ran_out(error):
            return {"memory": True}
        if isinstance(error, UserError) and not isinstance(error, TrainingError):
            return {"refused": str(error)}
        return {"failed": f"{type(error).__name__}: {error}"}


def main(folder: Path) -> int:
    """Returns the exit code: 0 where it was measured."""
    log = logging.getLogger("deepfast")
    request = Request(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    rank = launched()[0]
    if rank == 0:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("deepfast: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)

    def say(outcome: dict[str, Any]) -> None:
        checkpoint.write_atomically(folder / f"rank{rank}.json", json.dumps(outcome))

    def exceeded() -> None:
        say({"memory": True})
        os._exit(1)

    if request.memory is not None and not torch.cuda.is_available():
        memory.obey(request.memory, exceeded)
    outcome = _outcome(request, folder / "beat")
    say(outcome)
    return 0 if "peak" in outcome else 1


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
