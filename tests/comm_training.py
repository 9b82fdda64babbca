"""What trains over our collectives: DDP, FSDP2, whatever calls torch.distributed, and the engine."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from comm_world import DTYPES, RANK, SIZE, everybodys, mapped, same_bits, same_on_all_ranks
from torch import nn

import deepfast
from deepfast import reference
from deepfast.engine.owners import OwnedSums

COMM = GLOO = None  # set by comm_ranks.py


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
    sums = engine._gradients.sums
    assert mapped(sums.sums[0].data_ptr())
    passes = 2 if isinstance(sums, OwnedSums) else 1  # of a step: on one host each micro-batch's gradients are given up
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
                assert len(reduced) == passes * len(sums.buckets.members) * (step + 1), "all buckets within backward"
            engine.step()
        whole.step()
        assert engine.get_global_grad_norm() == pytest.approx(whole.grad_norm.item(), rel=1e-5)
    for p, q in zip(engine.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(p.detach())


def check_two_losses_in_one_step():
    """A backward pass after the buckets were reduced: the first rank keeps what is summed, and all reduce again."""
    config = {"train_batch_size": SIZE, "gradient_accumulation_steps": 1, "gradient_clipping": 0,
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
