"""What one sees of a run: metrics.jsonl, TensorBoard, a bar, the loss curve."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from deepfast.engine import checkpoint
from deepfast.engine.progress import PHASES
from deepfast.train.run import Run


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
    """metrics.jsonl, TensorBoard, the progress, and in the end loss.png."""

    def __init__(self, run: Run, engine: Any, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.engine = run, engine
        self.rows = run.read_metrics(engine.global_steps)
        checkpoint.write_atomically(run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = run.metrics.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run.events), purge_step=engine.global_steps + 1)
        self.progress = Progress(engine.global_steps, total)

    def step(self, loss: float, lr: float, rate: float) -> None:
        """Notes the step that the engine has just made: its mean loss, its learning rate, its tokens a second."""
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
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in row.items():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, row["step"])
        self.progress.step(f"loss {loss:.3f}, {rate:,.0f} tokens/s, loss scale {row['loss_scale']:g}")

    def flush(self) -> None:
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        self.board.close()

    def plot(self) -> None:
        """loss.png: the loss, and beneath it learning rate and loss scale."""
        if not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        steps = [row["step"] for row in self.rows]
        losses = [math.nan if row["loss"] is None else row["loss"] for row in self.rows]
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
        top.plot(steps, losses, color="tab:blue", linewidth=1, alpha=0.4, label="loss")
        window = max(1, len(losses) // 20)
        smooth = [sum(losses[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(losses))]
        top.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of the last {window + 1} steps")
        top.set_ylabel("loss (nats a token)")
        top.legend()
        top.grid(alpha=0.3)
        bottom.plot(steps, [row["lr"] for row in self.rows], color="tab:green")
        bottom.set_ylabel("learning rate", color="tab:green")
        bottom.set_xlabel("optimizer step")
        scales = bottom.twinx()
        scales.plot(steps, [row["loss_scale"] for row in self.rows], color="tab:red", linestyle="--")
        scales.set_yscale("log", base=2)
        scales.set_ylabel("loss scale", color="tab:red")
        figure.tight_layout()
        figure.savefig(self.run.plot, dpi=120)
        plt.close(figure)
