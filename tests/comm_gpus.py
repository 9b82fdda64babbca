"""What only GPUs' kernels and memory do: waits on the device, places that run out, peer memory on several hosts."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from comm_world import DTYPES, FLOATS, RANK, SIZE, everybodys, host, same_bits, same_on_all_ranks, same_statistics

from deepfast import reference
from deepfast.comm import Communicator, PeerTimeout, across
from deepfast.comm.by_torch import ByTorch

COMM = None  # set by comm_ranks.py, as is Communicator where a GPU is played


def check_a_slow_triton_kernel_is_waited_for():
    """Nobody overwrites what rank 0 has still to read, or leaves before it has written; its kernel pauses there."""
    from deepfast.kernels import squares

    memory, inner, statistics = COMM.empty(70_001), squares.add, torch.empty(2, dtype=torch.float64)
    rows = itertools.count()

    def slowly(*arguments):
        if next(rows) % 32 == 0 and RANK == 0:
            time.sleep(0.03)
        return inner(*arguments)

    squares.add = slowly
    try:
        for i in range(12):
            t = memory if i % 3 == 2 else torch.empty(5000)
            COMM.all_reduce_(t.fill_(i + RANK), statistics=statistics)
            assert (t == SIZE * i + SIZE * (SIZE - 1) / 2).all(), (i, t.numel())
        assert next(rows) > 12 * 32
    finally:
        squares.add = inner


def check_what_a_gpu_finds_is_raised_by_the_next_call():
    """A rank that is silent, one that does something else: the step is skipped, the next call says why."""
    last = SIZE - 1
    for wrong, error in (("silent", PeerTimeout), ("staged", PeerTimeout), ("scale", RuntimeError),
                         ("place", RuntimeError)):  # fmt: skip
        silent = wrong in ("silent", "staged")
        with Communicator(timeout=datetime.timedelta(seconds=1.5 if silent else 10)) as comm:
            memory = (torch.empty(100_000) if wrong == "staged" else comm.empty(100_000)).fill_(1.0)
            comm.all_reduce_(memory)
            statistics, found_inf = torch.zeros(2, dtype=torch.float64), torch.zeros(1)
            comm.check()
            start = time.monotonic()
            if SIZE > 1 and RANK != last:
                comm.all_reduce_(memory, statistics=statistics, found_inf=found_inf)
                assert (memory == SIZE).all(), "nothing is written"
                assert statistics[1] > 0
                assert found_inf == 1
            elif SIZE > 1 and wrong == "scale":
                comm.all_reduce_(memory, scale=3.0, statistics=statistics)
            elif SIZE > 1 and wrong == "place":
                comm.all_reduce_(memory[4:], statistics=statistics)
            else:
                time.sleep(3.0)
            if SIZE > 1 and (RANK != last or not silent):
                with pytest.raises(error) as caught:
                    comm.all_reduce_(torch.ones(1)) if RANK % 2 else comm.check()
                assert not silent or caught.value.ranks == (last,)
                assert time.monotonic() - start < 8.0
            dist.barrier()


def check_one_communicator_too_many_for_a_gpu_goes_by_torch():
    """Also where only one rank's GPU is full; a place is free again when its communicator is closed or goes."""
    cpu = torch.device("cpu")
    COMM.all_reduce_(torch.ones(1))
    open_now, each = len(across.Place._taken[cpu]), COMM._on(cpu)._backend.peer_layout()[-1]

    def opened(places_here):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(across, "multiprocessors", lambda device: (open_now + places_here) * each + each - 1)
            comm = Communicator()
            t = comm.empty(5000, torch.float32, cpu).fill_(1.0)
            assert (comm.all_reduce_(t) == SIZE).all()
        return comm

    def goes_by_torch(comm):
        return isinstance(comm._on(cpu), ByTorch)

    fills = opened(1)
    assert not goes_by_torch(fills)
    assert goes_by_torch(opened(1))
    assert goes_by_torch(opened(1 if RANK == 0 else 2)), "all ranks do the same"
    fills.close()
    again = opened(1)
    assert not goes_by_torch(again)
    assert goes_by_torch(opened(1))
    del again
    with opened(1) as last:
        assert not goes_by_torch(last)
    assert len(across.Place._taken[cpu]) == open_now


def check_gpus_of_several_hosts():
    """Sums over peer memory on each host, and between the hosts' GPUs of the same place."""
    for hosts in ("aabb", "abab"):
        with host(hosts[RANK]), Communicator() as comm:
            for dtype, numel, poison in itertools.product(DTYPES, (0, 3, 5000, 300_001), (False, True)):
                tensors = everybodys(numel, dtype, seed=7)
                measured = dtype in FLOATS and numel > 0
                if poison and measured:
                    tensors[2][numel // 2] = torch.inf
                t = tensors[RANK].clone() if poison else comm.empty(numel, dtype).copy_(tensors[RANK])
                op = "avg" if dtype.is_floating_point else "sum"
                statistics, found_inf = torch.zeros(2, dtype=torch.float64), torch.zeros(1)
                comm.all_reduce_(t, op, statistics=statistics if measured else None, found_inf=found_inf)
                torch.testing.assert_close(t, reference.reduced(tensors, 1 / SIZE if op == "avg" else 1.0))
                if measured:
                    same_statistics(statistics, t)
                    assert found_inf.item() == poison
                same_on_all_ranks(t)
                whole = torch.empty(SIZE, numel, dtype=dtype)
                comm.all_gather(whole, tensors[RANK])
                same_bits(whole, torch.stack(tensors))
            wide = torch.full((5000,), 256.0 if RANK == 0 else 1.0).bfloat16()
            comm.all_reduce_(wide)
            assert (wide == torch.tensor(255.0 + SIZE).bfloat16()).all(), "rounded once"
        with host(hosts[RANK]), Communicator(timeout=datetime.timedelta(seconds=1)) as comm:
            comm.all_reduce_(torch.ones(5000))
            if RANK == SIZE - 1:
                time.sleep(2.5)  # its host misses it, and the other host must skip the step as well
            statistics = torch.zeros(2, dtype=torch.float64)
            if hosts[RANK] == hosts[SIZE - 1]:
                with contextlib.suppress(PeerTimeout):  # where its kernels have ended before the call does
                    comm.all_reduce_(torch.ones(5000))
                with pytest.raises(PeerTimeout):
                    comm.all_reduce_(torch.ones(5000))
            else:
                comm.all_reduce_(torch.ones(5000), statistics=statistics)
                assert statistics[1] > 0
            dist.barrier()
