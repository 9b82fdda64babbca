"""Run by test_sharded.py on four ranks: DTensors, each check against one plain optimizer over whole tensors."""

from __future__ import annotations

import copy
import datetime
import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import NAMES, OURS, PEERS, TYPICAL
from checks import run_checks
from conftest import HANGS
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import deepfast
from deepfast import reference

SHAPES = [(9, 6), (3, 5), (1, 4), (700, 3)]  # uneven, and with less rows than ranks


def meshes():
    return {
        "1d": (dist.init_device_mesh("cpu", (4,)), [(Shard(0),), (Shard(1),), (Replicate(),)]),
        "2d": (
            dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
            [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(0), Replicate())],
        ),
    }


def layouts():
    return [(mesh, placements) for mesh, many in MESHES.values() for placements in many]


def whole(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]


def make(name, mesh, placements, dtype=torch.float32, **options):
    """Sharded and whole parameters, and an optimizer for each."""
    sharded = [nn.Parameter(distribute_tensor(t, mesh, placements)) for t in whole(dtype)]
    plain = [nn.Parameter(t) for t in whole(dtype)]
    options = {"lr": 0.01, **TYPICAL[name], **options}
    return sharded, OURS[name](sharded, **options), plain, OURS[name](plain, **options)


def give(sharded, plain, seed, scale=1.0):
    for p, q, g in zip(sharded, plain, whole(seed=seed), strict=True):
        q.grad = (g * scale).to(q.dtype)
        p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements)


def equal(sharded, plain, tolerance=1e-6):
    for p, q in zip(sharded, plain, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=tolerance, atol=tolerance)


def check_follow_the_whole(name):
    for mesh, placements in layouts():
        for dtype in (torch.float32, torch.float16):
            sharded, a, plain, b = make(name, mesh, placements, dtype, max_grad_norm=0.5)
            for i in range(4):
                give(sharded, plain, i)
                a.step(), b.step()
                torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
            equal(sharded, plain, 1e-6 if dtype == torch.float32 else 1e-3)
            for p, q in zip(sharded, plain, strict=True):
                for key, value in a.state[p].items():
                    if key == "step":
                        assert value == b.state[q][key]
                        continue
                    assert isinstance(value, DTensor), key
                    assert value.placements == placements
                    assert value.dtype == (torch.int16 if key == "master" else torch.float32)
                    found, exact = value, b.state[q][key]
                    if key == "master":
                        found, exact = a.get_master(p), b.get_master(q)
                    torch.testing.assert_close(found.full_tensor(), exact, rtol=1e-5, atol=1e-6)


def check_other_forms():
    """Rounded by the same chance on any number of ranks; moments of two bytes; a master that is given whole."""
    mesh, _ = MESHES["1d"]
    for options in ({"master": "none", "rounding": "stochastic"}, {"state_dtype": "bf16"}):
        sharded, a, plain, b = make("Adagrad", mesh, (Shard(0),), torch.bfloat16, **options)
        if "state_dtype" in options:
            for p, q in zip(sharded, plain, strict=True):
                exact = q.detach().float() * 1.001
                a.set_master(p, exact), b.set_master(q, exact)
        for i in range(3):
            give(sharded, plain, i)
            a.step(), b.step()
        for p, q in zip(sharded, plain, strict=True):
            assert torch.equal(p.full_tensor(), q.detach())
            assert torch.equal(a.state[p]["sum"].full_tensor(), b.state[q]["sum"])
            assert torch.equal(a.get_master(p).full_tensor(), b.get_master(q))
        copied = a.state_dict()["state"]
        assert all(v["master"].dtype == torch.float32 for v in copied.values() if "master" in v)


def check_8_bits():
    """Groups are those of a rank's own elements; what leaves it is a DTensor in full."""
    mesh, _ = MESHES["1d"]
    for placement in (Shard(0), Shard(1)):
        sharded, a, plain, b = make("Adam", mesh, (placement,), torch.bfloat16, state_dtype="int8")
        for i in range(3):
            give(sharded, plain, i)
            a.step(), b.step()
        equal(sharded, plain, 1e-2)
        saved = {compact: copy.deepcopy(a.state_dict(compact=compact)) for compact in (False, True)}
        for p, q, state in zip(sharded, plain, saved[True]["state"].values(), strict=True):
            assert a.state[p]["exp_avg"].numel() == reference.packed_size(p.to_local().numel())
            assert state["exp_avg_sq"].placements == p.placements
            exact = b.unpacked(q, "exp_avg_sq", b.state[q]["exp_avg_sq"])
            torch.testing.assert_close(state["exp_avg_sq"].full_tensor(), exact, rtol=0.2, atol=1e-6)
        again = [nn.Parameter(p.detach().clone()) for p in sharded]
        c = deepfast.Adam(again, **{**a.defaults, "lr": 0.01})
        c.load_state_dict(saved[False])
        for i in range(3, 5):
            give(sharded, plain, i), give(again, plain, i)
            a.step(), c.step()
        assert all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(sharded, again, strict=True))
        whole_state = copy.deepcopy(b.state_dict(compact=True))
        b.load_state_dict(saved[False])  # of whole parameters
        a.load_state_dict(whole_state)  # and back
        for p, state in zip(sharded, whole_state["state"].values(), strict=True):
            found = a.unpacked(p, "exp_avg_sq", a.state[p]["exp_avg_sq"]).full_tensor()
            exact = reference.unpack(state["exp_avg_sq"], p.shape)
            torch.testing.assert_close(found, exact, rtol=0.13, atol=1e-6)


def check_mixed_with_plain_parameters():
    (mesh, _), (two, _) = MESHES.values()
    tensors = whole()
    mixed = [nn.Parameter(distribute_tensor(tensors[0], mesh, (Shard(0),))), nn.Parameter(tensors[1].clone()),
             nn.Parameter(distribute_tensor(tensors[2], two, (Replicate(), Shard(1)))),
             nn.Parameter(distribute_tensor(tensors[3], mesh, (Replicate(),)))]  # fmt: skip
    plain = [nn.Parameter(t) for t in tensors]
    a, b = (deepfast.AdamW(p, lr=0.01, max_grad_norm=0.1) for p in (mixed, plain))
    for i in range(3):
        for p, q, g in zip(mixed, plain, whole(seed=i), strict=True):
            q.grad = g
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g.clone()
        a.step(), b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
    equal([p if isinstance(p, DTensor) else DTensor.from_local(p, mesh, (Replicate(),)) for p in mixed], plain)


def check_one_ranks_overflow_skips_all():
    mesh, _ = MESHES["1d"]
    sharded, a, _, _ = make("AdamW", mesh, (Shard(0),), torch.float16)
    scaler = deepfast.LossScaler(init_scale=8.0)
    for i, poisoned in enumerate((False, True, False)):
        before = [p.full_tensor().clone() for p in sharded]
        for p in sharded:
            g = torch.full(p.shape, scaler.get_scale(), dtype=torch.float16)
            p.grad = distribute_tensor(g, mesh, (Shard(0),))
        if poisoned and RANK == 2:
            sharded[3].grad.to_local()[0, 0] = float("inf")
        scaler.step(a)
        scaler.update()
        same = [torch.equal(p.full_tensor(), old) for p, old in zip(sharded, before, strict=True)]
        assert all(same) if poisoned else not any(same), (i, same)
        if not poisoned:
            torch.testing.assert_close(a.grad_norm, torch.tensor(float(sum(p.numel() for p in sharded))).sqrt())
    assert scaler.skipped_steps == 1
    assert scaler.get_scale() == 4.0


def check_gradients_that_lie_differently():
    mesh, _ = MESHES["1d"]
    for reset in (False, True):
        sharded, a, plain, b = make("AdamW", mesh, (Shard(0),), reset_grad=reset)
        for i in range(3):
            for p, q, g in zip(sharded, plain, whole(seed=i), strict=True):
                q.grad = g
                kind = i % 3
                if kind == 0:
                    p.grad = distribute_tensor(g.clone(), mesh, (Replicate(),))
                elif kind == 1:
                    p.grad = DTensor.from_local(g / 4, mesh, (Partial(),))
                else:
                    p.grad = distribute_tensor(g.clone(), mesh, (Shard(1),))
            a.step(), b.step()
            assert all(bool(p.grad.to_local().any()) != reset or p.grad.to_local().numel() == 0 for p in sharded)
        equal(sharded, plain)


def check_writes_from_outside():
    mesh, _ = MESHES["1d"]
    sharded, a, plain, b = make("AdamW", mesh, (Shard(0),), torch.bfloat16)
    for i in range(4):
        give(sharded, plain, i)
        if i == 2:  # what was written to a parameter that has no gradient now is not forgotten
            sharded[0].grad = plain[0].grad = None
        a.step(), b.step()
        with torch.no_grad():
            for p, q in zip(sharded, plain, strict=True) if i != 2 else ():
                p.mul_(0.5), q.mul_(0.5)
    equal(sharded, plain, 1e-6)
    with torch.no_grad():
        for p, q in zip(sharded, plain, strict=True):
            p.to_local().fill_(2.0), q.fill_(2.0)  # past the DTensor
    give(sharded, plain, 5)
    a.step(), b.step()
    equal(sharded, plain, 1e-6)
    y = (sharded[3] * sharded[3].detach()).sum()
    give(sharded, plain, 9)
    a.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def check_state_dicts():
    for name in NAMES:
        mesh, _ = MESHES["1d"]
        sharded, a, plain, b = make(name, mesh, (Shard(0),), torch.float16)
        for i in range(2):
            give(sharded, plain, i)
            a.step(), b.step()
        again, c, _, _ = make(name, mesh, (Shard(0),), torch.float16)
        full, d, _, _ = make(name, mesh, (Shard(0),), torch.float16)
        saved = copy.deepcopy(a.state_dict())
        for params, other, state in ((again, c, saved), (full, d, copy.deepcopy(b.state_dict()))):
            for p, q in zip(params, sharded, strict=True):
                p.data.copy_(q.data)
            other.load_state_dict(state)  # DTensors, and whole tensors
            assert all(isinstance(v, DTensor) for s in other.state.values() for k, v in s.items() if k != "step")
        whole_again = [nn.Parameter(p.full_tensor()) for p in sharded]
        e = OURS[name](whole_again, lr=0.01, **TYPICAL[name])
        e.load_state_dict(saved)
        give(sharded, plain, 5)
        for params in (again, full):
            give(params, plain, 5)
        for p, q in zip(whole_again, plain, strict=True):
            p.grad = q.grad.clone()
        for optimizer in (a, c, d, e):
            optimizer.step()
        for p, q, r, w in zip(sharded, again, full, whole_again, strict=True):
            assert torch.equal(p.to_local(), q.to_local())
            torch.testing.assert_close(p.full_tensor(), r.full_tensor(), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(p.full_tensor(), w.detach(), rtol=1e-3, atol=1e-3)


def check_the_plan_is_kept():
    mesh, _ = MESHES["1d"]
    sharded, a, plain, _ = make("AdamW", mesh, (Shard(0),))
    give(sharded, plain, 0)

    def steps(count):
        for _ in range(count):
            a.step()
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()), len(gc.get_objects())

    before = steps(5)
    plans = [launch._plan for launch in a._launches]
    after = steps(1000)
    assert all(launch._plan is plan for launch, plan in zip(a._launches, plans, strict=True))
    assert after[0] == before[0]
    assert after[1] <= before[1] + 5, (before, after)


def check_partial_parameters_are_refused():
    mesh, _ = MESHES["1d"]
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, (Partial(),)))
    with pytest.raises(ValueError, match="partial sums: redistribute"):
        deepfast.AdamW([p])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def batches(steps):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=g) for _ in range(steps)]


def losses(model, optimizer, mine, steps=5):
    out = []
    for x in batches(steps):
        x = x[RANK * 2 : RANK * 2 + 2] if mine else x
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if mine:
            dist.all_reduce(loss)
            loss = loss / 4
        out.append(loss.item())
    return torch.tensor(out)


def check_fsdp2(name):
    """fully_shard, also with a mesh that replicates, against one process; then torch's own way of keeping its state."""
    reference = net()
    expected = losses(reference, PEERS[name](reference.parameters(), lr=0.01, **TYPICAL[name]), False)
    for mesh, _ in MESHES.values():
        model = net()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = OURS[name](model.parameters(), lr=0.01, **TYPICAL[name])
        got = losses(model, optimizer, True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        state = get_optimizer_state_dict(model, optimizer)
        fresh = OURS[name](model.parameters(), lr=0.5, **TYPICAL[name])
        set_optimizer_state_dict(model, fresh, state)
        assert fresh.param_groups[0]["lr"] == 0.01
        for p in model.parameters():
            for key, value in optimizer.state[p].items():
                other = fresh.state[p][key]
                a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (value, other))
                assert torch.equal(a, b), key


def check_ddp(name):
    reference = net()
    expected = losses(reference, PEERS[name](reference.parameters(), lr=0.01, **TYPICAL[name]), False)
    model = nn.parallel.DistributedDataParallel(net())
    got = losses(model, OURS[name](model.parameters(), lr=0.01, **TYPICAL[name]), True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for p in model.parameters():  # every rank has the same bits
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p)


CHECKS = {
    **{f"follow the whole, {name}": (lambda name=name: check_follow_the_whole(name)) for name in NAMES},
    **{f"FSDP2, {name}": (lambda name=name: check_fsdp2(name)) for name in NAMES},
    **{f"DDP, {name}": (lambda name=name: check_ddp(name)) for name in NAMES},
    "mixed with plain parameters": check_mixed_with_plain_parameters,
    "one rank's overflow skips all": check_one_ranks_overflow_skips_all,
    "gradients that lie differently": check_gradients_that_lie_differently,
    "other forms": check_other_forms,
    "8 bits": check_8_bits,
    "writes from outside": check_writes_from_outside,
    "state dicts": check_state_dicts,
    "the plan is kept": check_the_plan_is_kept,
    "partial parameters are refused": check_partial_parameters_are_refused,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    RANK = dist.get_rank()
    MESHES = meshes()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
