"""Two processes with peer memory: sums, replayed graphs, and at last one that is killed.

    python tests/peers_ranks.py PLACE KERNELS

on a GPU that both share (KERNELS: gpu, and which; each maps the other's memory), or played on the host (cuda LIBRARY).
"""

from __future__ import annotations

import datetime
import itertools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from played import Played, play

from deepfast import ops, reference
from deepfast.comm import PeerTimeout, across

NUMELS = (1, 5, 4097, 70_001, 300_000)  # in one shot 256 KiB


def everybodys(numel, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(numel, generator=g) * 10).to(dtype) for _ in range(SIZE)]


def check_sums():
    for dtype, numel, peer in itertools.product((torch.float32, torch.float16, torch.bfloat16), NUMELS, (True, False)):
        tensors = everybodys(numel, dtype, seed=numel)
        own = tensors[RANK].to(DEVICE, copy=True)
        t = COMM.empty(numel, dtype, DEVICE).copy_(own) if peer else own
        statistics, found_inf = torch.zeros(2, dtype=torch.float64, device=DEVICE), torch.zeros(1, device=DEVICE)
        COMM.all_reduce_(t, "avg", statistics=statistics, found_inf=found_inf)
        want = reference.reduced(tensors, 1 / SIZE)
        assert torch.equal(t.cpu(), want)
        assert torch.equal(statistics.cpu(), ops.native.statistics([want]))
        assert found_inf.item() == 0
    whole, part = everybodys(SIZE * 9001, torch.bfloat16, seed=1)[RANK], torch.empty(9001, device=DEVICE)
    COMM.reduce_scatter(part, whole.to(DEVICE))
    parts = [t.view(SIZE, -1)[RANK].float() for t in everybodys(SIZE * 9001, torch.bfloat16, seed=1)]
    assert torch.equal(part.cpu(), reference.reduced(parts))
    gathered = torch.empty(SIZE, 9001, device=DEVICE)
    COMM.all_gather(gathered, part)
    assert torch.equal(gathered[RANK], part)


def check_a_graph_is_replayed():
    """What waits and counts lies on the device: the same launches serve again and again."""
    numels = (1000, 300_000)
    inputs = [torch.zeros(n, device=DEVICE) for n in numels]
    memory = [COMM.empty(n, torch.float32, DEVICE) for n in numels]
    statistics = torch.zeros(2, dtype=torch.float64, device=DEVICE)

    def step():
        for t, x in zip(memory, inputs, strict=True):
            t.copy_(x)
            COMM.all_reduce_(t, statistics=statistics)

    again = step
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        again = graph.replay
    for turn in range(5):
        for x in inputs:
            x.fill_(turn + RANK)
        again()
        total = SIZE * turn + SIZE * (SIZE - 1) / 2
        assert all((t == total).all() for t in memory), turn
        assert statistics[0].item() == 300_000 * total**2
        COMM.all_reduce_(inputs[0])  # others between them
        assert (inputs[0] == total).all()


def check_whoever_is_killed_is_named():
    """The kernel that waits for it ends, the step is skipped, the next call says who."""
    memory = COMM.empty(100_000, torch.float32, DEVICE).fill_(1.0)
    COMM.all_reduce_(memory)
    assert (memory == SIZE).all()  # read on the host: the kernel has ended
    if RANK == SIZE - 1:
        return
    statistics = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    start = time.monotonic()
    COMM.all_reduce_(memory, statistics=statistics)
    assert statistics[1].item() > 0  # waits for the device
    assert (memory == SIZE).all(), "nothing is written"
    assert time.monotonic() - start < 10.0, "long before the timeout"
    with pytest.raises(PeerTimeout, match="died") as caught:
        COMM.all_reduce_(memory)
    assert caught.value.ranks == (SIZE - 1,)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    out, kernels, *library = sys.argv[1:]
    torch.set_num_threads(1)
    DEVICE = torch.device("cuda", 0) if kernels == "gpu" else torch.device("cpu")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    SIZE, RANK = dist.get_world_size(), dist.get_rank()
    play(kernels, *library)
    if kernels != "gpu":
        across.multiprocessors = lambda device: 132
    COMM = Played(timeout=datetime.timedelta(seconds=30))
    run_checks(CHECKS, Path(out, f"{RANK}.json"))
    if RANK == SIZE - 1:
        os.kill(os.getpid(), signal.SIGKILL)
