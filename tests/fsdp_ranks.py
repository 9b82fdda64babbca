"""Run by test_fsdp.py on two ranks: both kinds of FSDP, with either scaler, beside torch's default optimizers."""

from __future__ import annotations

import datetime
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import OURS
from checks import run_checks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import deepfast

OPTIONS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.05}}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def flat(dtype=torch.float32, original=True, **options):
    return FullyShardedDataParallel(net(dtype), use_orig_params=original, device_id=torch.device("cpu"), **options)


def whole(model):
    if not isinstance(model, FullyShardedDataParallel):
        return [p.full_tensor().detach() for p in model.parameters()]
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone() for p in model.parameters()]


def backward(model, scale, step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + RANK))
    scale(model(x.to(next(model.parameters()).dtype)).square().mean()).backward()


def train(model, optimizer, scaler, poisoned=(), clip=None):
    """Weights and scales over six steps; in those that are ``poisoned`` one rank's shard has an infinite gradient."""
    trace = []
    for step in range(6):
        optimizer.zero_grad()
        backward(model, scaler.scale, step)
        if step in poisoned and RANK == 1:
            grad = next(p.grad for p in reversed(list(model.parameters())) if p.grad is not None and p.numel())
            getattr(grad, "_local_tensor", grad).view(-1)[-1] = float("inf")
        if clip:
            scaler.unscale_(optimizer)
            model.clip_grad_norm_(clip)
        scaler.step(optimizer)
        scaler.update()
        trace.append((scaler.get_scale(), whole(model)))
    return trace


def same(ours, theirs, tolerance=1e-5):
    for (scale, weights), (expected, others) in zip(ours, theirs, strict=True):
        assert scale == expected
        for p, q in zip(weights, others, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def sharded_scaler():
    return ShardedGradScaler("cpu", init_scale=4.0, growth_interval=2)


def check_the_ranks_of_fsdp1_agree(name):
    """With fused=True, too, where torch's own optimizers let them part."""
    dtypes = (torch.float32, torch.float16) if name == "SGD" else (torch.float32,)  # torch's AdamW: 0 / 0 in fp16
    for dtype, original, flags in itertools.product(dtypes, (True, False), ({}, {"fused": True})):
        runs = []
        for classes, options in ((OURS, flags), (vars(torch.optim), {})):
            model = flat(dtype, original)
            optimizer = classes[name](model.parameters(), **OPTIONS[name], **options)
            runs.append(train(model, optimizer, sharded_scaler(), poisoned=(1, 4)))
        same(*runs, tolerance=1e-5 if dtype == torch.float32 else 5e-3)
        assert [scale for scale, _ in runs[0]] == [4, 2, 2, 4, 2, 2]


def check_fsdp1_clips(name):
    for original in (True, False):
        runs = []
        for cls in (OURS[name], getattr(torch.optim, name)):
            model = flat(original=original)
            runs.append(train(model, cls(model.parameters(), **OPTIONS[name]), sharded_scaler(), (2,), clip=0.1))
        same(*runs)


def refused(what, call):
    with pytest.raises(RuntimeError, match=r"flat shards of FullyShardedDataParallel") as caught:
        call()
    assert re.search(what, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def check_what_a_rank_cannot_know_is_refused():
    for original, strategy in itertools.product((True, False), ("FULL_SHARD", "SHARD_GRAD_OP")):
        model = flat(original=original, sharding_strategy=ShardingStrategy[strategy])
        before = whole(model)
        backward(model, lambda loss: loss, 0)
        clipped = deepfast.AdamW(model.parameters(), max_grad_norm=0.1)
        refused(r"global gradient norm.*clip_grad_norm_\(\)", clipped.step)
        refused("norm of a layer.*another optimizer", deepfast.LAMB(model.parameters()).step)
        for cls in (deepfast.AdamW, torch.optim.AdamW):
            scaler, optimizer = deepfast.LossScaler(init_scale=4.0), cls(model.parameters())
            refused("overflow of another rank.*ShardedGradScaler", lambda s=scaler, o=optimizer: s.step(o))
            refused("overflow of another rank.*ShardedGradScaler", lambda s=scaler, o=optimizer: s.unscale_(o))
        for p, q in zip(whole(model), before, strict=True):
            assert torch.equal(p, q)


def check_the_ranks_of_fsdp2_agree(name):
    for make_scaler, dtype in itertools.product(
        (
            lambda: torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2),
            lambda: deepfast.LossScaler(init_scale=4.0, growth_interval=2),
        ),
        (torch.float32, torch.bfloat16),
    ):
        runs = []
        for cls, scaler in (
            (OURS[name], make_scaler()),
            (getattr(torch.optim, name), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)),
        ):
            model = net(dtype)
            fully_shard(model)
            runs.append(train(model, cls(model.parameters(), **OPTIONS[name]), scaler, poisoned=(1, 4)))
        same(*runs, tolerance=1e-5 if dtype == torch.float32 else 3e-2)


CHECKS = {
    **{f"the ranks of FSDP1 agree, {n}": lambda n=n: check_the_ranks_of_fsdp1_agree(n) for n in OPTIONS},
    **{f"FSDP1 clips, {n}": lambda n=n: check_fsdp1_clips(n) for n in OPTIONS},
    "what a rank cannot know is refused": check_what_a_rank_cannot_know_is_refused,
    **{f"the ranks of FSDP2 agree, {n}": lambda n=n: check_the_ranks_of_fsdp2_agree(n) for n in OPTIONS},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    RANK = dist.get_rank()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
