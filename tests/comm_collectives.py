"""Collectives against plain torch over everybody's tensors, ranks that are slow, silent or gone, and shared memory."""

from __future__ import annotations

import datetime
import itertools
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from comm_world import (
    DTYPES,
    FLOATS,
    HALVES,
    RANK,
    SIZE,
    everybodys,
    host,
    mapped,
    same_bits,
    same_on_all_ranks,
    same_statistics,
)

from deepfast import reference
from deepfast.comm import Communicator, PeerTimeout

COMM = None  # set by comm_ranks.py, as are Communicator, NUMELS and HOWS where a GPU is played
# Around a block of statistics, what is sent in one shot, a staged piece; and nothing at all
NUMELS = (0, 1, 5, 1023, 4096, 4097, 8192, 16_385, 50_000, 300_001, 1_100_003)
HOWS = ("staged", "zero-copy", "mixed")


def placed(comm, t, how):
    """The tensor in ordinary memory, in the communicator's, or there on every other rank alone."""
    if how == "staged" or (how == "mixed" and RANK % 2 == 0):
        return t.clone()
    return comm.empty(t.numel(), t.dtype).copy_(t)


def check_sums():
    for dtype, numel in itertools.product(DTYPES, NUMELS):
        tensors = everybodys(numel, dtype)
        want = reference.reduced(tensors)
        exact = sum(x.to(torch.float64 if dtype.is_floating_point else dtype) for x in tensors)
        torch.testing.assert_close(want, exact.to(dtype))
        scaled = reference.reduced(tensors, 0.37 / SIZE) if dtype.is_floating_point else None
        for how in HOWS:
            t = placed(COMM, tensors[RANK], how)
            assert COMM.all_reduce_(t) is t
            same_bits(t, want)
            if scaled is not None:
                t = placed(COMM, tensors[RANK], how)
                COMM.all_reduce_(t, "avg", scale=0.37)
                same_bits(t, scaled)


def check_any_layout():
    """In logical order, also where a rank's memory is in another."""
    tensors = [t.view(6, 4, 10, 7) for t in everybodys(6 * 4 * 10 * 7, torch.float32)]
    want = reference.reduced(tensors)
    own = tensors[RANK]
    layouts = [
        own.clone(),
        own.to(memory_format=torch.channels_last),
        own.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        own.repeat_interleave(2, -1)[..., ::2],
    ]
    for shift in range(len(layouts)):
        t = layouts[(RANK + shift) % len(layouts)].clone(memory_format=torch.preserve_format)
        strides = t.stride()
        COMM.all_reduce_(t)
        assert t.stride() == strides
        same_bits(t, want)
    with pytest.raises(TypeError, match="float32, float16"):
        COMM.all_reduce_(torch.ones(3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="not scaled or averaged"):
        COMM.all_reduce_(torch.ones(3, dtype=torch.int32), scale=2.0)
    with pytest.raises(ValueError, match="op='max' is not known"):
        COMM.all_reduce_(torch.ones(3), "max")


def check_rounded_once():
    one = lambda value, dtype: torch.full((5000,), value, dtype=dtype)  # noqa: E731
    t = one(256.0 if RANK == 0 else 1.0, torch.bfloat16)
    out = torch.empty(5000)
    COMM.reduce_scatter(out, t.repeat(SIZE))
    assert (out == 255.0 + SIZE).all(), "bf16 256 + 1 in bf16 is 256"
    COMM.all_reduce_(t)
    assert (t == torch.tensor(255.0 + SIZE).bfloat16()).all()
    for dtype, value in ((torch.float16, 40000.0), (torch.bfloat16, 3e38), (torch.float32, 3e38)):
        t = one(value, dtype)
        COMM.all_reduce_(t, "avg")
        torch.testing.assert_close(t, one(value, dtype))  # finite: divided before it is rounded
        t = one(value, dtype)
        COMM.all_reduce_(t)
        assert SIZE == 1 or t.isinf().all()


def check_statistics():
    for dtype, numel, how in itertools.product(FLOATS, NUMELS[1::3], HOWS[:2]):
        for poison in (None, float("inf"), float("nan")):
            tensors = everybodys(numel, dtype, seed=1)
            if poison is not None:
                tensors[-1][numel // 2] = poison
            t = placed(COMM, tensors[RANK], how)
            statistics, found_inf = torch.full((2,), 7.0, dtype=torch.float64), torch.zeros(1)
            COMM.all_reduce_(t, "avg", statistics=statistics, found_inf=found_inf)
            same_statistics(statistics, t)
            assert found_inf.item() == (poison is not None)
            assert statistics[1].item() == (poison is not None)
    found_inf = torch.ones(1)
    COMM.all_reduce_(torch.ones(3), found_inf=found_inf)
    assert found_inf.item() == 1.0, "never cleared"
    loud = torch.full((3,), 1e300, dtype=torch.float64) * (float("inf") if RANK == 0 else 1.0)
    found_inf.zero_()
    COMM.all_reduce_(loud, found_inf=found_inf)
    assert found_inf.item() == 1.0


def check_scatter_and_gather():
    for dtype, numel in itertools.product(DTYPES, NUMELS[::2]):
        tensors = everybodys(SIZE * numel, dtype, seed=2)
        wide = [torch.float32] if dtype in HALVES else []
        summed = {d: reference.reduced([x.view(SIZE, numel)[RANK].to(d) for x in tensors]) for d in (dtype, *wide)}
        narrow = HALVES if dtype == torch.float32 else []
        stacked = torch.stack([x[:numel] for x in tensors])
        gathered = {d: stacked.to(d) for d in (dtype, *wide, *narrow)}
        for how in HOWS:
            t = placed(COMM, tensors[RANK], how).view(SIZE, numel)
            for out_dtype, want in summed.items():
                out = torch.empty(numel, dtype=out_dtype)
                assert COMM.reduce_scatter(out, t) is out
                same_bits(out, want)
            part = placed(COMM, tensors[RANK][:numel], how)
            for out_dtype, want in gathered.items():
                whole = torch.empty(SIZE, numel, dtype=out_dtype)
                assert COMM.all_gather(whole, part) is whole
                same_bits(whole, want)
    out, statistics = torch.empty(9000, dtype=torch.bfloat16), torch.empty(2, dtype=torch.float64)
    COMM.reduce_scatter(out, everybodys(SIZE * 9000, torch.bfloat16)[RANK], "avg", statistics=statistics)
    same_statistics(statistics, out)
    with pytest.raises(RuntimeError, match="times the other's elements"):
        COMM.all_gather(torch.empty(SIZE * 3 + 1), torch.empty(3))
    with pytest.raises(TypeError, match="cannot turn"):
        COMM.all_gather(torch.empty(SIZE * 3, dtype=torch.int32), torch.empty(3))


def check_functional():
    tensors = everybodys(10, torch.float32, seed=3)
    x = tensors[RANK].clone().requires_grad_()

    def loss(x):
        return (COMM.all_reduce(x * 2, "avg") * (RANK + 1)).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for f in (loss, compiled):
        x.grad = None
        value = f(x)
        value.backward()
        torch.testing.assert_close(value, 2 * sum(tensors).sum() / SIZE * (RANK + 1))
        torch.testing.assert_close(x.grad, torch.full((10,), SIZE + 1.0))
    assert torch.equal(x.detach(), tensors[RANK])
    name = COMM._name
    torch.library.opcheck(torch.ops.deepfast.all_reduce, (x, name, 1.0), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="communicator 99 is gone"):
        torch.ops.deepfast.all_reduce(x, "communicator 99", 1.0)


def check_several_at_once():
    """Two threads with a communicator each, and subgroups that overlap: nothing mixes."""
    groups = [dist.new_group(ranks) for ranks in ([0, *range(2, SIZE)], list(range(SIZE)), [SIZE - 1])]
    comms = [Communicator(g) for g in groups if isinstance(g, dist.ProcessGroup)]
    wrong = []

    def work(comm, seed):
        for i in range(150):
            numel = (37, 9000, 100_000)[i % 3]
            tensors = [torch.full((numel,), float(seed * 1000 + i + r)) for r in range(comm.size)]
            t = tensors[comm.rank] if i % 2 else comm.empty(numel).copy_(tensors[comm.rank])
            comm.all_reduce_(t)
            if not (
                t == sum(x[0] for x in [torch.full((1,), float(seed * 1000 + i + r)) for r in range(comm.size)])
            ).all():
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(comm, comm.size)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for comm in comms:
        comm.close()


def check_a_slow_rank_is_waited_for():
    with Communicator(timeout=datetime.timedelta(seconds=20)) as comm:
        t = torch.ones(10)
        if RANK == SIZE - 1:
            time.sleep(1.0)
        start = time.monotonic()
        comm.all_reduce_(t)
        assert (t == SIZE).all()
        assert RANK == SIZE - 1 or time.monotonic() - start > 0.5


def check_a_silent_rank_is_named():
    comm = Communicator(timeout=datetime.timedelta(seconds=0.5))
    comm.all_reduce_(torch.ones(1))
    last = SIZE - 1
    if SIZE > 1:
        if RANK == last:
            time.sleep(1.0)
        with pytest.raises(PeerTimeout, match="missing rank") as caught:
            comm.all_reduce_(torch.ones(100_000))
        assert RANK == last or caught.value.ranks == (last,), caught.value
        with pytest.raises(RuntimeError, match="broken, make a new one"):
            comm.all_reduce_(torch.ones(1))
    comm.close()
    with pytest.raises(RuntimeError, match=r"closed|broken"):
        comm.all_reduce_(torch.ones(1))
    COMM.all_reduce_(torch.ones(1))  # others are not touched
    with Communicator() as fresh:
        assert fresh.all_reduce_(torch.ones(1)).item() == SIZE


def check_who_leaves_is_named():
    comm = Communicator()
    if RANK == 0:
        comm.close()
    elif SIZE > 1:
        with pytest.raises(PeerTimeout, match="left") as caught:
            comm.all_reduce_(torch.ones(1))
        assert caught.value.ranks == (0,) or SIZE > 2


def check_ranks_that_do_not_do_the_same():
    for other in (lambda c: c.all_reduce_(torch.ones(5)), lambda c: c.all_reduce_(torch.ones(4, dtype=torch.int32)),
                  lambda c: c.all_gather(torch.empty(4 * SIZE), torch.ones(4)),
                  lambda c: c.all_reduce_(torch.ones(4), scale=2.0),
                  lambda c: c.all_reduce_(torch.ones(4), found_inf=torch.zeros(1))):  # fmt: skip
        with Communicator() as comm:
            if SIZE == 1:
                continue
            with pytest.raises(RuntimeError, match="do not do the same"):
                other(comm) if RANK == 0 else comm.all_reduce_(torch.ones(4))
            dist.barrier()


def check_memory():
    free = os.statvfs("/dev/shm").f_bfree if Path("/dev/shm").is_dir() else 0
    names = sorted(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else []
    comm = Communicator()
    tensors = [comm.empty(numel, dtype) for dtype in DTYPES for numel in (0, 1, 5000)]
    large = comm.empty(30_000_000).fill_(1.0)  # 120 MB
    tensors = [t for t in tensors if t.numel()]
    assert all(mapped(t.data_ptr()) for t in (*tensors, large))
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    comm.all_reduce_(large)
    assert (large == SIZE).all()
    comm.all_reduce_(large[7:20_000])  # any part of it is zero-copy, too
    dist.barrier()
    if free:
        assert sorted(os.listdir("/dev/shm")) == names
        assert os.statvfs("/dev/shm").f_bfree >= free - 1000
    where = large.data_ptr()
    del large
    assert comm.empty(30_000_000).data_ptr() == where, "freed memory is used again"
    with pytest.raises(RuntimeError, match="of shared memory"):
        comm.empty(1 << 46)
    with pytest.raises(ValueError, match="negative"):
        comm.empty(-1)
    comm.close()
    del comm
    tensors[-1].fill_(3)
    assert (tensors[-1] == 3).all(), "outlives its communicator"


def check_several_hosts():
    for hosts in ("aabb", "abab", "abcc", "aaab"):
        with host(hosts[RANK]), Communicator() as comm:
            for dtype, numel in itertools.product(DTYPES, (0, 3, 5000, 300_001)):
                tensors = everybodys(numel, dtype, seed=4)
                t = tensors[RANK].clone()
                op = "avg" if dtype.is_floating_point else "sum"
                statistics = torch.empty(2, dtype=torch.float64) if dtype in FLOATS else None
                comm.all_reduce_(t, op, statistics=statistics)
                torch.testing.assert_close(t, reference.reduced(tensors, 1 / SIZE if op == "avg" else 1.0))
                if statistics is not None:
                    same_statistics(statistics, t)
                same_on_all_ranks(t)
                whole = torch.empty(SIZE, numel, dtype=dtype)
                comm.all_gather(whole, tensors[RANK])
                same_bits(whole, torch.stack(tensors))
                out, many = torch.empty(numel, dtype=dtype), everybodys(SIZE * numel, dtype, seed=5)
                comm.reduce_scatter(out, many[RANK])
                torch.testing.assert_close(out, reference.reduced(many).view(SIZE, numel)[RANK])


def check_small_sums_in_a_row():
    """Nobody's memory is written while another still reads it, whoever is ahead."""
    for i in range(60):
        t = torch.full((700 * (i % 7 + 1),), float(i + RANK))
        COMM.all_reduce_(t)
        assert (t == SIZE * i + SIZE * (SIZE - 1) / 2).all(), i
        if i % 11 == RANK:
            time.sleep(0.003)
