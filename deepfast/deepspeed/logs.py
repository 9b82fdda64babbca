"""What scripts say through DeepSpeed: its logger is deepfast's."""

from __future__ import annotations

import functools
import gc
import logging
from typing import Any

import torch.distributed as dist

from deepfast.deepspeed.devices import available, get_accelerator, total

logger: Any = logging.getLogger("deepfast")  # Any: it has warning_once, too


@functools.cache
def warning_once(message: str) -> None:
    """A warning that is given once in a process."""
    logger.warning(message)


logger.warning_once = warning_once


def _said(message: str, ranks: list[int] | None) -> str | None:
    """With this rank's number, where it is to speak: it is in ``ranks``, or they are [-1], or there are no others."""
    rank = dist.get_rank() if dist.is_initialized() else -1
    if rank < 0 or (ranks and (ranks[0] == -1 or rank in ranks)):
        return f"[Rank {rank}] {message}"
    return None


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the ranks that are named, [-1]: on all of them. Where there are several and none is named, on none."""
    said = _said(message, ranks)
    if said is not None:
        logger.log(level, said)


_logged: set[tuple[str, int]] = set()


def log_dist_once(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    if (message, level) not in _logged:
        _logged.add((message, level))
        log_dist(message, ranks, level)


def print_dist(message: str, ranks: list[int] | None = None) -> None:
    """The same on stdout, whatever the logger's level."""
    said = _said(message, ranks)
    if said is not None:
        print(said)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Prints how much memory is taken, on rank 0, in GiB; as in DeepSpeed only if ``force`` is set."""
    if not force or (dist.is_initialized() and dist.get_rank() != 0):
        return
    gc.collect()
    device = get_accelerator()
    figures = {
        "allocated": device.memory_allocated(),
        "peak": device.max_memory_allocated(),
        "reserved": device.memory_reserved(),
        "host used": total() - available(),
        "host total": total(),
    }
    print(message, "|", ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in figures.items()))
    device.reset_peak_memory_stats()
