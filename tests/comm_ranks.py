"""Run by test_comm.py on one to four ranks: collectives against plain torch over everybody's tensors."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from torch import nn

import deepfast
from deepfast import ops, reference
from deepfast.comm import Communicator, PeerTimeout, across
from deepfast.comm.by_torch import ByTorch

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
DTYPES = (*FLOATS, torch.float64, torch.int32, torch.int64)
# Around a block of statistics, what is sent in one shot, a staged piece; and nothing at all
NUMELS = (0, 1, 5, 1023, 4096, 4097, 8192, 16_385, 50_000, 300_001, 1_100_003)
HOWS = ("staged", "zero-copy", "mixed")


def everybodys(shape, dtype, seed=0):
    """The tensors of all ranks, the same on each."""
    g = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [torch.randint(info.min, info.max, (shape,), generator=g, dtype=dtype) for _ in range(SIZE)]
    return [(torch.randn(shape, generator=g, dtype=torch.float64) * 10).to(dtype) for _ in range(SIZE)]


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    if a.dtype.is_floating_point:
        assert torch.equal(a.isnan(), b.isnan())
        a, b = (torch.where(t.isnan(), 0.0, t).to(t.dtype) for t in (a, b))
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_on_all_ranks(t):
    everyone = [torch.empty_like(t) for _ in range(SIZE)]
    dist.all_gather(everyone, t)
    for other in everyone:
        same_bits(t, other)


def same_statistics(statistics, t):
    want = ops.native.statistics([t])
    if EXACT:
        same_bits(statistics, want)
    else:
        torch.testing.assert_close(statistics, want, rtol=1e-6, atol=0, equal_nan=True)


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


def mapped(address):
    """Whether the address lies in memory of ours that all ranks map."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(x, 16) for x in span.split("-"))
        if begin <= address < end:
            return "memfd:deepfast" in name
    return False


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


@contextlib.contextmanager
def host(name):
    os.environ["DEEPFAST_HOST_ID"] = name
    try:
        yield
    finally:
        del os.environ["DEEPFAST_HOST_ID"]


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


def net():
    torch.manual_seed(0)
    return Net()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(30, 100), nn.Linear(100, 100), nn.Linear(100, 30)])
        self.norm = nn.LayerNorm(30)
        self.sometimes = nn.Linear(30, 30)

    def forward(self, x, both):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.norm(x) + (self.sometimes(x) if both else 0)


def train_ddp(ddp, steps=20, accumulation=1, ragged=False):
    # Not Adam: where a gradient is nearly zero, it makes whole steps of the last bits, and gloo adds in another order.
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulation):
            torch.manual_seed(1000 * step + 10 * micro + RANK)
            with contextlib.nullcontext() if micro == accumulation - 1 else ddp.no_sync():
                ddp(torch.randn(4, 30), not ragged or (step + RANK) % 2 == 0).square().mean().backward()
        optimizer.step()
    return ddp


def same_training(options, **training):
    ddp = nn.parallel.DistributedDataParallel
    theirs = train_ddp(ddp(net(), process_group=GLOO, bucket_cap_mb=0.05, **options), **training)
    ours = train_ddp(ddp(net(), bucket_cap_mb=0.05, **options), **training)  # the default group is ours
    hooked = ddp(net(), process_group=GLOO, bucket_cap_mb=0.05, **options)
    hooked.register_comm_hook(COMM, deepfast.comm.allreduce_hook)
    train_ddp(hooked, **training)
    for p, q, r in zip(theirs.parameters(), ours.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(q, p)
        torch.testing.assert_close(r, p)
        same_bits(q.detach(), r.detach())
    if options.get("gradient_as_bucket_view"):
        assert all(mapped(p.grad.data_ptr()) for p in ours.parameters()), "DDP's buckets lie in our memory"


def check_ddp():
    same_training({})


def check_ddp_with_unused_parameters():
    same_training({"find_unused_parameters": True}, ragged=True)


def check_ddp_with_no_sync():
    same_training({}, accumulation=3)


def check_ddp_with_gradients_in_the_buckets():
    same_training({"gradient_as_bucket_view": True}, accumulation=2)


def check_fsdp2():
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (SIZE,))
    module, plain = net(), net()
    for layer in (*module.layers, module):
        fully_shard(layer, mesh=mesh)
    module.set_allocate_memory_from_process_group_for_comm(True)
    sharded, whole = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (module, plain))
    for step in range(20):
        sharded.zero_grad(), whole.zero_grad()
        for rank in range(SIZE):
            torch.manual_seed(1000 * step + rank)
            x = torch.randn(4, 30)
            (plain(x, True).square().mean() / SIZE).backward()
            if rank == RANK:
                module(x, True).square().mean().backward()
        sharded.step(), whole.step()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-5)


def check_the_backend():
    """What is ours, at once and later; what is gloo's; in subgroups, too."""
    for dtype in DTYPES:
        tensors = everybodys(5000, dtype, seed=6)
        for later in (False, True):
            t = tensors[RANK].clone()
            work = dist.all_reduce(t, async_op=later)
            if work is not None:
                work.wait()
            same_bits(t, reference.reduced(tensors))
    works = [dist.all_reduce(torch.full((n,), 1.0), async_op=True) for n in (3, 100_000, 7, 50_000)]
    for work in works:
        work.wait()
        assert work.is_completed()
        assert (work.get_future().value()[0] == SIZE).all()
    t = torch.full((4,), float(RANK))
    dist.all_reduce(t, op=dist.ReduceOp.AVG)
    assert (t == (SIZE - 1) / 2).all()
    dist.all_reduce(t.fill_(RANK), op=dist.ReduceOp.MAX)
    assert (t == SIZE - 1).all()
    dist.broadcast(t.fill_(RANK), 0)
    assert (t == 0).all()
    whole, part = torch.empty(SIZE * 3), torch.full((3,), float(RANK))
    dist.all_gather_into_tensor(whole, part)
    assert whole.tolist() == [float(r) for r in range(SIZE) for _ in range(3)]
    dist.reduce_scatter_tensor(part, whole)
    assert (part == RANK * SIZE).all()
    flags = torch.tensor([RANK == 0])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    assert flags.item()
    sub = dist.new_group([0, SIZE - 1])
    if RANK in (0, SIZE - 1):
        dist.all_reduce(t.fill_(1.0), group=sub)
        assert (t == len({0, SIZE - 1})).all()
    dist.barrier()


def check_the_engine():
    """Sums in our memory, reduced in buckets while backward runs; the norm is known before the step."""
    config = {"train_batch_size": 4 * SIZE, "gradient_accumulation_steps": 2, "gradient_clipping": 0.1,
              "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}  # fmt: skip
    engine, *_ = deepfast.initialize(model=net(), config=config)
    sums = engine._sums
    assert mapped(sums.flat.data_ptr())
    reduced = []
    inner = sums.buckets._ready
    sums.buckets._ready = lambda b: (reduced.append(b), inner(b))
    plain = net()
    whole = deepfast.AdamW(plain.parameters(), lr=0.01, max_grad_norm=0.1, weight_decay=0.0)
    engine.optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(6):
        whole.zero_grad()
        for micro in range(2):
            for rank in range(SIZE):
                torch.manual_seed(1000 * step + 10 * micro + rank)
                x = torch.randn(2, 30)
                used = (step + rank) % 2 == 0  # `sometimes`, by some ranks; by one rank alone, not always
                (plain(x, used).square().mean() / SIZE / 2).backward()
                if rank == RANK:
                    engine.backward(engine(x, used).square().mean())
            if micro == 1 and step % 2 == RANK % 2:
                assert len(reduced) == len(sums.buckets.members) * (step + 1), "all buckets within backward"
            engine.step()
        whole.step()
        assert engine.get_global_grad_norm() == pytest.approx(whole.grad_norm.item(), rel=1e-5)
    for p, q in zip(engine.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(p.detach())


def check_two_losses_in_one_step():
    """A backward pass after the buckets were reduced: the first rank keeps what is summed, and all reduce again."""
    config = {"train_batch_size": SIZE, "gradient_accumulation_steps": 1,
              "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}  # fmt: skip
    engine, *_ = deepfast.initialize(model=net(), config=config)
    plain = net()
    for step in range(2):
        plain.zero_grad()
        for loss in range(3):
            for rank in range(SIZE):
                torch.manual_seed(100 * step + 10 * loss + rank)
                x = torch.randn(2, 30)
                (plain(x, loss == 1).square().mean() / SIZE).backward()
                if rank == RANK:
                    engine.backward(engine(x, loss == 1).square().mean())
        engine.step()
        with torch.no_grad():
            for p in plain.parameters():
                p -= p.grad
    for p, q in zip(engine.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


ALWAYS = ("sums", "any_layout", "rounded_once", "statistics", "scatter_and_gather", "silent_rank", "who_leaves", "same")


def check_small_sums_in_a_row():
    """Nobody's memory is written while another still reads it, whoever is ahead."""
    for i in range(60):
        t = torch.full((700 * (i % 7 + 1),), float(i + RANK))
        COMM.all_reduce_(t)
        assert (t == SIZE * i + SIZE * (SIZE - 1) / 2).all(), i
        if i % 11 == RANK:
            time.sleep(0.003)


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


CHECKS = [name for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    SIZE, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    place, kernels, *library = sys.argv[1:]
    torch.set_num_threads(1)
    deepfast.comm.register_backend()
    dist.init_process_group("deepfast", timeout=datetime.timedelta(seconds=HANGS / 3))
    GLOO = dist.new_group(backend="gloo")
    EXACT = True
    if kernels != "cpu":
        from played import Played as Communicator
        from played import exact_fma, play

        play(kernels, *library)
        across.multiprocessors = lambda device: 132
        EXACT = kernels == "cuda" or exact_fma()
        # In one shot 256 KiB
        NUMELS = (0, 1, 5, 4097, 50_000, 70_001, 300_001) if kernels == "cuda" else (0, 1, 5, 4097, 20_000, 70_001)
        HOWS = ("staged", "zero-copy")
    COMM = Communicator()
    run_checks({name: globals()[name] for name in wanted(SIZE, kernels)}, Path(place, f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
