"""The curves of a run, drawn now and then while it goes on."""

from __future__ import annotations

import logging
import math
import os
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("deepfast")

_POINTS = 2000  # of a curve: more than a picture has


class Curves:
    """loss.png: the loss and the validation's, with its perplexity, and beneath them learning rate and loss scale.

    Args:
        path: of the picture. Who looks at it sees the one before, or this one.
    """

    PAUSE = 30.0  # seconds from one picture to the next
    AFTER_CHECKPOINT = 10.0  # to one after a checkpoint or a validation
    SHARE = 50  # and so many times what one takes: drawing is to cost hardly anything

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns = {name: array("d") for name in ("step", "loss", "lr", "loss_scale", "eval_loss")}
        self._drawn, self._took = time.monotonic(), 0.0
        self._failed = False

    def add(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(math.nan if value is None else value)

    def draw_if_due(self, *, checkpoint: bool) -> None:
        """Draws if the last picture is old.

        Args:
            checkpoint: there is a new checkpoint, or validation.
        """
        pause = self.AFTER_CHECKPOINT if checkpoint else self.PAUSE
        if time.monotonic() - self._drawn >= max(pause, self.SHARE * self._took):
            self.draw()

    def draw(self) -> None:
        """Draws. Where that fails, there is a line, and training goes on."""
        if not self._columns["step"]:
            return
        began = time.monotonic()
        staged = self._path.with_name(f".{self._path.name}.tmp")
        try:
            _draw({name: np.array(column) for name, column in self._columns.items()}, staged)
            os.replace(staged, self._path)
        except Exception as error:  # of the disk, or whatever the libraries below raise: it is only a picture
            if not self._failed:
                why = error.strerror if isinstance(error, OSError) else error
                log.warning("%s cannot be drawn: %s; training goes on", self._path, why)
            self._failed = True
            staged.unlink(missing_ok=True)
        self._drawn = time.monotonic()
        self._took = self._drawn - began


def _draw(columns: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    steps, losses = columns["step"], columns["loss"]
    figure = Figure(figsize=(8, 6))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(*_outline(steps, losses), color="tab:blue", linewidth=1, alpha=0.4, label="loss")
    window = max(1, len(losses) // 20)
    some = slice(None, None, -(-len(steps) // _POINTS))
    smooth = _means(losses, window + 1)
    top.plot(steps[some], smooth[some], color="tab:blue", linewidth=2, label=f"mean of the last {window + 1} steps")
    held = np.isfinite(columns["eval_loss"])
    if held.any():
        values = columns["eval_loss"][held]
        style = {"marker": "o", "markersize": 3} if len(values) <= 100 else {}
        top.plot(steps[held], values, color="tab:orange", linewidth=2, label="validation loss", **style)
        beside = top.secondary_yaxis("right", functions=(_perplexity, _loss))
        beside.set_ylabel("perplexity")
    top.set_ylabel("loss (nats a token)")
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot(*_outline(steps, columns["lr"]), color="tab:green")
    bottom.set_ylabel("learning rate", color="tab:green")
    bottom.set_xlabel("optimizer step")
    if (columns["loss_scale"] != 1).any():
        scales = bottom.twinx()
        scales.plot(*_outline(steps, columns["loss_scale"]), color="tab:red", linestyle="--")
        scales.set_yscale("log", base=2)
        scales.set_ylabel("loss scale", color="tab:red")
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=120)


def _perplexity(loss: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(loss, 700.0))  # what fp64 holds; an axis is asked for more than there is on it


def _loss(perplexity: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(perplexity, 1e-300))


def _outline(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A long curve's lowest and highest point in each stretch of it; a short one as it is."""
    if len(steps) <= 2 * _POINTS:
        return steps, values
    edges = np.arange(0, len(steps), -(-len(steps) // _POINTS))
    ends = np.stack([np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)], axis=1)
    return steps[edges].repeat(2), ends.reshape(-1)


def _means(values: np.ndarray, window: int) -> np.ndarray:
    """Of each value and those before it, ``window`` in all, the mean of those that are numbers."""
    known = np.isfinite(values)
    sums, counts = (np.cumsum(np.concatenate([[0.0], v])) for v in (np.where(known, values, 0.0), known))
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    count = counts[1:] - counts[first]
    return np.where(count > 0, (sums[1:] - sums[first]) / np.maximum(count, 1), math.nan)
