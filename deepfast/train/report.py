"""What one sees of a run: metrics.jsonl, TensorBoard, a bar, the curves, samples of text."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from deepfast.engine.progress import PHASES
from deepfast.train.plot import Curves
from deepfast.train.run import Run
from deepfast.train.validation import perplexity

log = logging.getLogger("deepfast")


def _finite(value: float | None) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of a GPU, what was allocated; on a CPU this process's resident pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


class Progress:
    """How far the run is, on stderr: a bar on a terminal; in a file a line now and then, and for the last step."""

    PAUSE = 10.0  # seconds from one line to the next

    def __init__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        self.first, self.done, self.total = done, done, total
        self.began, self.next = time.monotonic(), -math.inf
        self.bar = tqdm(
            total=total, initial=done, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty(), file=sys.stderr
        )

    def step(self, said: str) -> None:
        self.done += 1
        self.bar.set_postfix_str(said)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and (now >= self.next or self.done == self.total):
            self.next = now + self.PAUSE
            line = self.bar.format_meter(
                self.done, self.total, now - self.began, unit="step", initial=self.first, postfix=said,
                bar_format="step {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            )  # fmt: skip
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


class Reporter:
    """metrics.jsonl, samples.jsonl, TensorBoard, the progress, and loss.png."""

    def __init__(self, run: Run, engine: Any, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.engine = run, engine
        self.curves = Curves(run.plot)
        self.validations: list[tuple[float, int]] = []  # loss and step, where it is a number
        for row in run.cut_short(run.metrics, engine.global_steps):
            self._remember(row)
        if run.samples.exists():
            run.cut_short(run.samples, engine.global_steps)
        self.file = run.metrics.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run.events), purge_step=engine.global_steps + 1)
        self.progress = Progress(engine.global_steps, total)

    def _remember(self, row: dict[str, Any]) -> None:
        self.curves.add(row)
        if row.get("eval_loss") is not None:
            self.validations.append((row["eval_loss"], row["step"]))

    def step(self, loss: float, lr: float, rate: float, eval_loss: float | None = None) -> None:
        """Notes the step that the engine has just made.

        Args:
            loss: the mean of its batch.
            rate: its tokens a second.
            eval_loss: what a validation has found after it, if there was one.
        """
        engine = self.engine
        row = {
            "step": engine.global_steps,
            "loss": _finite(loss),
            "lr": lr,
            "loss_scale": engine.loss_scale,
            "grad_norm": _finite(engine.get_global_grad_norm()),
            "tokens_per_s": round(rate, 1),
            "skipped": engine.skipped_steps,
            "memory_mib": round(peak_memory(engine.device) / 2**20, 1),
            **{f"{PHASES[name]}_ms": round(time, 3) for name, time in engine.get_wall_clock_timers().items()},
        }
        if eval_loss is not None:
            known = _finite(eval_loss)
            row |= {"eval_loss": known, "eval_perplexity": None if known is None else perplexity(known)}
            if engine.monitor.enabled and known is not None:  # the name is DeepSpeed's
                engine.monitor.write_events([("Train/Samples/eval_loss", known, engine.global_samples)])
        self._remember(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in row.items():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, row["step"])
        said = [f"loss {loss:.3f}", f"{rate:,.0f} tokens/s"]
        if self.validations:
            said.insert(1, f"validation {_loss(self.validations[-1][0], '.3f')}")
        if row["loss_scale"] != 1:
            said.append(f"loss scale {row['loss_scale']:g}")
        self.progress.step(", ".join(said))

    def sample(self, text: str) -> None:
        """Notes what the model writes after this step."""
        step = self.engine.global_steps
        with self.run.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
        self.board.add_text("sample", "\n".join(f"    {line}" for line in text.splitlines()), step)  # as it is written
        log.info("a sample after step %d:\n%s\n----------------", step, text)

    def validated(self) -> str | None:
        """The last and the best loss of all validations, in words."""
        if not self.validations:
            return None
        last, best = self.validations[-1], min(self.validations)
        said, better = (f"loss {_loss(loss, '.4f')} after step {step}" for loss, step in (last, best))
        return said + (f"; the best: {better}" if best[0] < last[0] else ", the best")

    def flush(self) -> None:
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        self.board.close()


def _loss(loss: float, digits: str) -> str:
    of_tokens = perplexity(loss)
    return f"{loss:{digits}}{'' if of_tokens is None else f' (perplexity {of_tokens:.4g})'}"
