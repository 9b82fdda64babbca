"""What a search leaves: lines of a table, tune.json, tune.png, and the configuration with the best batch."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

from deepfast.engine import checkpoint
from deepfast.engine.config import Config
from deepfast.train.tune import memory
from deepfast.train.tune.search import Result, best

MICRO = ("train_micro_batch_size", "train_micro_batch_size_per_gpu")  # the flat spelling, DeepSpeed's
KEYS = ("train_batch_size", *MICRO, "gradient_accumulation_steps")
_WIDTHS = (6, 13, 12, 12, 12)


def _line(*cells: str) -> str:
    return "  ".join([cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=False)] + [cells[-1]]).rstrip()


HEAD = _line("micro", "accumulation", "tokens/s", "of best yet", "peak memory", "note")


def line(results: list[Result], note: str) -> str:
    """The table's line of the last one."""
    last = results[-1]
    batch = (str(last.micro), str(last.accumulation))
    if last.outcome != "measured":
        return _line(*batch, "-", "-", "-", note)
    share = last.tokens_per_s / max(result.tokens_per_s for result in results)
    return _line(*batch, f"{last.tokens_per_s:,.0f}", f"{share:.0%}", memory.said(last.peak), note)


def with_batch(data: dict[str, Any], config: Config, chosen: Result, ranks: int) -> tuple[dict[str, Any], list[str]]:
    """(the configuration with this batch instead of its own, the keys that hold it).

    In its own spelling; what it leaves to be computed stays so. Where it counts accumulation as of one process, as the
    trainer reads it, it goes on doing so.

    Args:
        data: the configuration as it was written.
        config: the same, its batch resolved for these ranks.
    """
    written, accumulation = copy.deepcopy(data), chosen.accumulation
    given = data.get(KEYS[-1])
    if isinstance(given, (int, float)) and given != config.gradient_accumulation_steps:
        accumulation *= ranks
    if not set(MICRO) & data.keys():
        sections = any(isinstance(value, dict) for value in data.values())  # it is in DeepSpeed's
        written[MICRO[sections]] = chosen.micro
    batch = chosen.micro * chosen.accumulation * ranks
    values = dict(zip(KEYS, (batch, chosen.micro, chosen.micro, accumulation), strict=True))
    keys = [key for key in values if key in written]
    return {**written, **{key: values[key] for key in keys}}, keys


def machine(ranks: int) -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    import torch

    import deepfast

    name = platform.machine()
    info = Path("/proc/cpuinfo")
    for text in info.read_text(encoding="utf-8").splitlines() if info.is_file() else ():
        if text.startswith("model name"):
            name = text.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": name,
        "cores": cores,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "deepfast": deepfast.__version__,
        "ranks": ranks,
    }


def write_figures(path: Path, about: dict[str, Any], results: list[Result], ended: str) -> None:
    """tune.json. (An error's text may name paths: it is left out.)"""
    found = best(results)
    rows = [{k: v for k, v in dataclasses.asdict(result).items() if k != "said"} for result in results]
    chosen = found and {"micro": found[0].micro, "accumulation": found[0].accumulation, "why": found[1]}
    text = json.dumps({**about, "trials": rows, "ended": ended, "chosen": chosen}, indent=2)
    checkpoint.write_atomically(path, text + "\n")


def write_configuration(path: Path, data: dict[str, Any]) -> None:
    checkpoint.write_atomically(path, json.dumps(data, indent=2) + "\n")


def plot(path: Path, results: list[Result], configured: int) -> None:
    """tune.png: tokens/s, and beneath it memory, over the micro-batch. At least one was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [result for result in results if result.outcome == "measured"]
    found = best(results)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2))
    sizes = [result.micro for result in measured]
    top.plot(sizes, [result.tokens_per_s for result in measured], "o-", color="tab:blue")
    bottom.plot(sizes, [result.peak / 2**20 for result in measured], "o-", color="tab:green")
    for axes, figures in ((top, "tokens_per_s"), (bottom, "peak")):
        scale = 1 if axes is top else 2**20
        for result in measured:
            if found and result is found[0]:
                value = getattr(result, figures) / scale
                axes.plot(result.micro, value, "*", color="tab:orange", markersize=18, label="chosen")
            if result.micro == configured:
                axes.axvline(result.micro, color="gray", linestyle=":", label="as configured")
        for kind, color, label in (("memory", "tab:red", "out of memory"), ("failed", "black", "failed")):
            sizes = [result.micro for result in results if result.outcome == kind]
            if sizes:
                axes.plot(sizes, [0] * len(sizes), "x", color=color, markersize=10, label=label, clip_on=False)
        axes.set_ylim(0, 1.1 * max(getattr(result, figures) / scale for result in measured))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    top.set_ylabel("tokens/s")
    top.legend()
    bottom.set_ylabel("peak memory of a rank (MiB)")
    bottom.set_xlabel("micro-batch (sequences)")
    bottom.set_xscale("log", base=2)
    ticks = [result.micro for result in results]
    bottom.set_xticks(ticks, [str(tick) for tick in ticks])
    bottom.minorticks_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
