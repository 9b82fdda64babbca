"""Run by test_mesh_norms.py on four ranks: an overflow anywhere, and all ranks of all meshes decide the same."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import OURS
from checks import run_checks
from conftest import HANGS
from meshes import Meshes, World, same_bits
from torch import nn
from torch.distributed.tensor import DTensor

import deepfast

ALL = ["rows", "hsdp", "fsdp and tp", "plain", "expert", "beside tp", "tp", "expert alone", "replicas", "plain part"]
SHARDED = [way for way in ALL if not way.startswith("plain")]
BAD = (float("nan"), float("inf"), -float("inf"))


def local(t):
    return t._local_tensor if isinstance(t, DTensor) else t


def poison(world, number, rank, value):
    """The last element of what ``rank`` holds of that gradient. Returns whether it holds any (on all ranks)."""
    held = local(world.params[number].grad)
    there = torch.tensor(int(RANK == rank and held.numel() > 0))
    if there:
        held.view(-1)[-1] = value
    dist.all_reduce(there)
    return bool(there)


def state(scaler):
    return torch.tensor([float(scaler.state_dict()[key]) for key in sorted(scaler.state_dict())], dtype=torch.float64)


def check_an_overflow_anywhere(ways, make, unscale, said=True):
    """On each rank and in each parameter, every second step; a clean step follows."""
    world = World(MESHES, ways)
    optimizer = make(world.params)
    if said and hasattr(optimizer, "distinct_over"):
        world.say(optimizer)
    scaler = deepfast.LossScaler(init_scale=2.0**30, max_scale=2.0**30, growth_interval=3, hysteresis=2)
    alone = deepfast.LossScaler(init_scale=2.0**30, max_scale=2.0**30, growth_interval=3, hysteresis=2)
    one = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    skipped = 0
    for number in range(len(ways)):
        for rank in range(4):
            for poisoned in (True, False):
                scale = scaler.get_scale()
                world.give(number, scale)
                bad = poisoned and poison(world, number, rank, BAD[rank % 3])
                before = [local(p).clone() for p in world.params]
                if unscale:
                    scaler.unscale_(optimizer)
                    if not bad:
                        for nth, (p, i) in enumerate(zip(world.params, world.mine, strict=True)):
                            expected = local(world.cut(nth, world.whole[i].grad.clone())) / scale
                            torch.testing.assert_close(local(p.grad), expected)
                scaler.step(optimizer)
                found = scaler.found_inf(optimizer)
                assert bool(found > 0) == bad, (number, rank)
                assert same_bits((found > 0).int())
                scaler.update()
                same = [torch.equal(local(p), old) for p, old in zip(world.params, before, strict=True)]
                stays = [bad or old.numel() == 0 for old in before]
                assert same == stays, (number, rank, poisoned, same)
                if hasattr(optimizer, "grad_norm") and not unscale and not bad:
                    assert same_bits(optimizer.grad_norm)
                one.param_groups[0]["params"][0].grad = torch.full((1,), float("nan") if bad else 1.0)
                alone.step(one), alone.update()
                assert state(scaler).tolist() == state(alone).tolist()
                assert same_bits(state(scaler))
                skipped += bad
    assert scaler.skipped_steps == skipped >= 3 * len(ways)


def ours(**options):
    return lambda params: OURS["AdamW"](params, lr=0.01, **options)


def check_nothing_said():
    """What ranks there are beside an expert's is known from the mesh that its mesh is a part of."""
    check_an_overflow_anywhere(["expert"], ours(), False, said=False)
    check_an_overflow_anywhere(["beside tp", "expert alone", "rows"], ours(), False, said=False)


def check_agreed_without_being_distinct():
    """Of plain parameters, where that is all that has been said."""
    world = World(MESHES, ["plain"])
    a = OURS["AdamW"](world.params, lr=0.01)
    a.distinct_over(MESHES.flat, ())
    for rank in range(4):
        for unscale in (False, True):
            scaler = deepfast.LossScaler(init_scale=4.0)
            world.give(rank, 4.0)
            assert poison(world, 0, rank, float("nan"))
            if unscale:
                scaler.unscale_(a)
            scaler.step(a)
            assert scaler.found_inf(a) > 0
            scaler.update()
            world.give(rank, 2.0)
            scaler.step(a)
            torch.testing.assert_close(a.grad_norm, world.whole[0].grad.norm() / 2)
            scaler.update()
            assert scaler.get_scale() == 2


def check_a_rank_without_gradients():
    """It skips with the others; ranks of which none has one make a clean step."""
    for make in (ours(), ours(max_grad_norm=1.0)):
        for unscale in (False, True):
            world = World(MESHES, ["plain parts"])
            a = make(world.params)
            world.say(a)
            scaler = deepfast.LossScaler(init_scale=4.0)
            for step, bad in enumerate((True, False, True, False)):
                world.give(step, 4.0)
                if RANK == step:
                    world.params[0].grad = None
                if bad:
                    assert poison(world, 0, (step + 1) % 4, float("nan"))
                before = world.params[0].detach().clone()
                if unscale:
                    scaler.unscale_(a)
                scaler.step(a)
                assert bool(scaler.found_inf(a) > 0) == bad
                scaler.update()
                assert same_bits(state(scaler))
                assert torch.equal(world.params[0], before) == (bad or RANK == step)
            world.params[0].grad = None
            scaler.step(a), scaler.update()
            assert scaler.skipped_steps == 2
    world = World(MESHES, ["plain"])
    for cls in (OURS["AdamW"], torch.optim.AdamW):
        with pytest.raises(RuntimeError, match="none of its parameters has a gradient"):
            deepfast.LossScaler(init_scale=4.0).step(cls(world.params))
    for cls in (OURS["AdamW"], torch.optim.AdamW):
        world = World(MESHES, ["rows", "expert"])
        optimizer, scaler = cls(world.params), deepfast.LossScaler(init_scale=4.0)
        world.give(0, 4.0, without=(1,))
        assert poison(world, 0, 2, float("nan"))
        scaler.step(optimizer), scaler.update()
        assert scaler.get_scale() == 2.0


def check_several_optimizers():
    """Dense layers have one and experts another; an update for both."""
    world = World(MESHES, ["rows", "expert alone", "plain"])
    dense, experts = OURS["AdamW"](world.params[::2]), OURS["Lion"](world.params[1:2])
    experts.distinct_over(MESHES.flat)
    scaler = deepfast.LossScaler(init_scale=64.0)
    for rank in range(4):
        before = [local(p).clone() for p in world.params]
        world.give(rank, scaler.get_scale())
        assert poison(world, 1, rank, float("inf"))
        for optimizer in (dense, experts):
            scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(local(p), old) or old.numel() == 0 for p, old in zip(world.params, before, strict=True)]
        assert same == [before[0].numel() == 0, True, False], same
        assert scaler.get_scale() == 64.0 / 2 ** (rank + 1)
        assert same_bits(state(scaler))


def check_one_scale_for_optimizers_that_not_all_ranks_share():
    """Each is skipped where its own gradients are bad; the scale is one."""
    for cls in (OURS["AdamW"], torch.optim.AdamW):
        for unscale in (False, True):
            world = World(MESHES, ["rows", "expert alone"])
            dense, experts = cls(world.params[:1], lr=0.01), cls(world.params[1:], lr=0.01)
            scaler = deepfast.LossScaler(init_scale=64.0)
            for rank in range(4):
                world.give(rank, scaler.get_scale())
                assert poison(world, 1, rank, float("inf"))
                before = local(world.params[1]).clone()
                for optimizer in (dense, experts):
                    if unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                scaler.update()
                assert torch.equal(local(world.params[1]), before) == (RANK % 2 == rank % 2)
                assert scaler.get_scale() == 64.0 / 2 ** (rank + 1)
                assert same_bits(state(scaler))


def check_16_bits():
    """fp16 shards: unscaled within the step, and clipped there."""
    world = World(MESHES, ALL, torch.float16)
    a, b = (OURS["AdamW"](p, lr=0.01, max_grad_norm=0.5) for p in (world.params, world.whole))
    world.say(a)
    scalers = [deepfast.LossScaler(init_scale=16.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        world.give(step, scalers[0].get_scale())
        if step == 3:
            assert poison(world, 4, 2, float("inf"))
            world.whole[0].grad[0] = float("inf")
        for scaler, optimizer in zip(scalers, (a, b), strict=True):
            scaler.step(optimizer), scaler.update()
        if step != 3:
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        world.differ(2e-3)
        assert state(scalers[0]).tolist() == state(scalers[1]).tolist()
    assert scalers[0].skipped_steps == 1


CHECKS = {
    "in a step": lambda: check_an_overflow_anywhere(ALL, ours(), False),
    "in a step that clips": lambda: check_an_overflow_anywhere(ALL, ours(max_grad_norm=1.0), False),
    "in plain torch": lambda: check_an_overflow_anywhere(ALL, ours(backend="reference"), False),
    "unscaled before": lambda: check_an_overflow_anywhere(ALL, ours(), True),
    "unscaled before a step that clips": lambda: check_an_overflow_anywhere(ALL, ours(max_grad_norm=1.0), True),
    "a foreign optimizer": lambda: check_an_overflow_anywhere(SHARDED, torch.optim.AdamW, False),
    "a foreign optimizer, unscaled before": lambda: check_an_overflow_anywhere(SHARDED, torch.optim.AdamW, True),
    "nothing said": check_nothing_said,
    "agreed without being distinct": check_agreed_without_being_distinct,
    "a rank without gradients": check_a_rank_without_gradients,
    "several optimizers": check_several_optimizers,
    "one scale for optimizers that not all ranks share": check_one_scale_for_optimizers_that_not_all_ranks_share,
    "16 bits": check_16_bits,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    RANK = dist.get_rank()
    MESHES = Meshes()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
