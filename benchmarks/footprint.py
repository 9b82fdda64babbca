"""How much of a host's memory a training step of GPT-2 124M needs, all ranks together; what they share counts once.

Each measurement has processes of its own: what others have left behind is in none.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import DTYPES, RANKS
from sharded import TRAINERS

SELF = Path("/proc/self")


def mib(file: str, key: str) -> float:
    """Of this process, what the kernel counts."""
    lines = (SELF / file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def proportional() -> float:
    """In MiB, a page that several processes share counted in parts; when no rank holds what it has freed."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    found = mib("smaps_rollup", "Pss")
    dist.barrier()
    return found


def of_training(name: str, dtype: str, tokens: int) -> dict[str, float]:
    """Of this contender: in MiB the peak of all ranks, what one keeps; and how long a step took. All ranks call it."""
    folder: list = [None]
    with tempfile.TemporaryDirectory() as folder[0]:
        dist.broadcast_object_list(folder)
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            found = fresh.submit(step, dist.get_rank(), f"{folder[0]}/store", name, dtype, tokens).result()
        dist.barrier()
    return found


def step(rank: int, store: str, name: str, dtype: str, tokens: int) -> dict[str, float]:
    """The second step's peak, beyond what there was before module and engine were made.

    The kernel keeps each process's peak of resident pages (a thread that looks again and again sees less, and holds up
    the step). They are added up, wherever in the step they come, and the pages that are in several are taken off.
    """
    import transformers

    TRAINERS[name].load()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    before = proportional()
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(DTYPES[dtype])
    training = TRAINERS[name].make(module, DTYPES[dtype])
    ids = torch.randint(module.config.vocab_size, (1, tokens))

    def once() -> None:
        training.backward(training.forward(input_ids=ids, labels=ids).loss)
        training.step()

    once()
    at_rest = proportional()
    of_others = mib("status", "VmRSS") - at_rest
    dist.barrier()
    (SELF / "clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    once()
    seconds, peak = time.perf_counter() - start, mib("status", "VmHWM") - of_others
    sums = torch.tensor([peak - before, at_rest - before], dtype=torch.float64)
    dist.all_reduce(sums)
    kept = training.kept() if training.kept else {}
    dist.barrier()
    dist.destroy_process_group()
    return {
        **dict(zip(("peak_mib", "between_steps_mib"), sums.tolist(), strict=True)),
        **{f"{what}_mib": sum(t.nbytes for t in tensors) / 2**20 for what, tensors in kept.items()},
        "seconds": seconds,
    }
