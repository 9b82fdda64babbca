"""Run by test_comm.py on one to four ranks: collectives against plain torch over everybody's tensors.

The checks are those of MODULES. Here is which of them run where, and what a rank sets there: its communicator and the
like.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import comm_collectives
import comm_gpus
import comm_training
import comm_world
import torch
import torch.distributed as dist
from checks import run_checks
from comm_world import RANK, SIZE
from conftest import HANGS

import deepfast
from deepfast.comm import Communicator, across

MODULES = (comm_world, comm_collectives, comm_training, comm_gpus)
CHECKS = {name: check for module in MODULES for name, check in vars(module).items() if name.startswith("check_")}
ALWAYS = ("sums", "any_layout", "rounded_once", "statistics", "scatter_and_gather", "silent_rank", "who_leaves", "same")
# Where a GPU is played: what its kernels and its memory decide.
PLAYED = (
    "sums",
    "any_layout",
    "rounded_once",
    "statistics",
    "scatter_and_gather",
    "functional",
    "slow_rank",
    "gpu_finds",
    "too_many",
)


def wanted(size, kernels="cpu"):
    """On two ranks everything, but for what needs four; elsewhere what may depend on their number."""
    if kernels != "cpu":
        parts = (*PLAYED, *(["slow_triton"] if kernels == "triton" else [])) if size < 4 else ("gpus_of_several",)
        return [c for c in CHECKS if any(part in c for part in parts)]
    checks = [c for c in CHECKS if "gpu" not in c and "triton" not in c]
    if size == 4:
        return checks
    four = {"check_several_hosts"}
    return [c for c in checks if c not in four and (size == 2 or any(part in c for part in ALWAYS))]


if __name__ == "__main__":
    place, kernels, *library = sys.argv[1:]
    torch.set_num_threads(1)
    deepfast.comm.register_backend()
    dist.init_process_group("deepfast", timeout=datetime.timedelta(seconds=HANGS / 3))
    here = {"GLOO": dist.new_group(backend="gloo")}
    if kernels != "cpu":
        from played import Played as Communicator
        from played import exact_fma, play

        play(kernels, *library)
        across.multiprocessors = lambda device: 132
        here["EXACT"] = kernels == "cuda" or exact_fma()
        # In one shot 256 KiB
        here["NUMELS"] = (0, 1, 5, 4097, *((50_000, 70_001, 300_001) if kernels == "cuda" else (20_000, 70_001)))
        here["HOWS"] = ("staged", "zero-copy")
    here.update(Communicator=Communicator, COMM=Communicator())
    for module in MODULES:
        vars(module).update(here)
    run_checks({name: CHECKS[name] for name in wanted(SIZE, kernels)}, Path(place, f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
