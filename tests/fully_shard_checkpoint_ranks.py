"""Run by test_fully_shard.py on four ranks: torch.distributed.checkpoint of what fully_shard has cut.

Gradients are given, the same on any number of ranks, so that a continuation is the same to the bit or it is wrong.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from beside_whole import batch, gathered, loss_of, net
from checks import run_checks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import deepfast

FP32, BF16 = torch.float32, torch.bfloat16
FORMS = {
    "split": {},
    "fp32 master": {"master": "fp32"},
    "by chance": {"master": "none", "rounding": "stochastic"},
    "bf16 moments": {"state_dtype": "bf16"},
    "int8 moments": {"state_dtype": "int8"},
}
OPTIMIZERS = (deepfast.AdamW, deepfast.SGD, deepfast.Lion, deepfast.Adagrad)


def made(options=None, mesh=None, dtype=BF16, kind=deepfast.AdamW, factor=1.0):
    """With uneven shards, empty ones, and a layer that never has a gradient. factor: other weights."""
    model = net(dtype).append(nn.Linear(3, 5).to(dtype)).requires_grad_(True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh or MESH)
    return model, kind(model.parameters(), lr=0.01, **(options or {}))


def steps(model, optimizer, *which):
    for step in which:
        g = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            if not name.startswith("3."):
                grad = torch.randn(p.shape, generator=g).to(p.dtype)
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [gathered(p).clone() for p in model.parameters()]


def same(model, other):
    for p, q in zip(weights(model), other if isinstance(other, list) else weights(other), strict=True):
        assert torch.equal(p, q)


def saved(model, optimizer, save=dcp.save):
    """A folder that it has been saved to, and what ``save`` has returned."""
    folder = Path(sys.argv[1], f"checkpoint{next(NUMBERS)}")
    state, optim = get_state_dict(model, optimizer)
    return folder, save({"model": state, "optim": optim}, checkpoint_id=folder)


def loaded(folder, model, optimizer, group=None, planner=None):
    state, optim = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optim": optim}, checkpoint_id=folder, process_group=group, planner=planner)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optim)
    return model, optimizer


def check_the_same_continuation(form):
    """On as many ranks, on two, on one; and what the loss was before, it is after."""
    model, optimizer = made(FORMS[form])
    steps(model, optimizer, 0, 1, 2)
    before = loss_of(model(batch(0).to(BF16)))
    folder, _ = saved(model, optimizer)
    steps(model, optimizer, 3, 4)
    after = weights(model)
    for mesh, group in ((MESH, None), *SMALLER):
        if mesh is None:
            continue
        again, other = loaded(folder, *made(FORMS[form], mesh, factor=1.5), group)
        assert torch.equal(loss_of(again(batch(0).to(BF16))), before)
        assert other.state[next(again.parameters())]["step"].item() == 3
        steps(again, other, 3, 4)
        if form == "int8 moments" and mesh is not MESH:
            # Groups are a rank's own elements: others are rounded otherwise, by a part of their largest. A step is lr.
            for p, q in zip(weights(again), after, strict=True):
                torch.testing.assert_close(p, q, rtol=2.0**-7, atol=2 * 0.01 / 4)
        else:
            same(again, after)


def check_state_that_is_asked_for_is_no_step():
    """torch makes an optimizer without state step; training after that is as if it had not."""
    for kind, (form, options) in itertools.product(OPTIMIZERS, FORMS.items()):
        if form == "split" or kind is deepfast.AdamW:
            runs = [made(options, kind=kind) for _ in range(3)]
            model, optimizer = runs[0]
            before = weights(model)
            state = get_optimizer_state_dict(model, optimizer)["state"]
            assert set(state) == {name for name, _ in model.named_parameters()}
            same(model, before)
            assert {float(s["step"]) for s in optimizer.state.values() if "step" in s} <= {0.0}
            if "master" in next(iter(optimizer.state.values())):
                for p, q in zip(model.parameters(), before, strict=True):
                    assert torch.equal(gathered(optimizer.get_master(p)), q.float())
            set_optimizer_state_dict(*runs[1], get_optimizer_state_dict(*runs[1]))
            for run in runs:
                steps(*run, 0, 1, 2)
            same(runs[0][0], runs[2][0])
            same(runs[1][0], runs[2][0])
            assert not torch.equal(weights(model)[0], before[0])


def check_a_step_from_elsewhere_is_one():
    """Gradients of zero and lr = 0 alone are no reason."""
    model, optimizer = made({})
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {s["step"].item() for s in optimizer.state.values()} == {1.0}
    for clip in (None, 1.0):
        model, optimizer = made({"max_grad_norm": clip})
        optimizer.step()  # without gradients
        assert optimizer.grad_norm == (clip and 0.0)
        assert optimizer.state_dict()["state"] == {}
        steps(model, optimizer, 0)
        assert {s["step"].item() for s in optimizer.state.values()} == {1.0}


def check_every_rank_has_the_same_keys():
    """Also where a rank has no row, and of what never had a gradient: not before the first step, and not after."""
    for trained in (False, True):
        for options in FORMS.values():
            model, optimizer = made(options)
            if trained:
                steps(model, optimizer, 0)
            state = get_optimizer_state_dict(model, optimizer)["state"]
            keys = sorted((name, key) for name, values in state.items() for key in values)
            assert {name for name, _ in keys} == {name for name, _ in model.named_parameters()}
            everybodys = [None] * SIZE
            dist.all_gather_object(everybodys, keys)
            assert everybodys == [keys] * SIZE
            assert all(t.dtype in (FP32, BF16) for values in state.values() for t in values.values())
    assert any(p.to_local().numel() == 0 for p in model.parameters()) == (RANK == SIZE - 1)


WAYS = {
    "sharded": ({}, {}),
    "on the CPU": ({"cpu_offload": True}, {}),
    "flat": ({"flatten_optimizer_state_dict": True},) * 2,
    "whole, on each rank": ({"full_state_dict": True},) * 2,
    "whole, on rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}


def check_way(name):
    out, back = (StateDictOptions(**options) for options in WAYS[name])
    for options in FORMS.values():
        model, optimizer = made(options)
        steps(model, optimizer, 0, 1, 2)
        state, optim = copy.deepcopy(get_state_dict(model, optimizer, options=out))
        steps(model, optimizer, 3, 4)
        again, other = made(options, factor=1.5)
        # (set_state_dict waits for ever where a rank has nothing: torch takes that for "the optimizer only".)
        set_model_state_dict(again, state, options=back)
        set_optimizer_state_dict(again, other, optim, options=back)
        steps(again, other, 3, 4)
        same(again, model)


def check_saved_beside_training():
    for options in FORMS.values():
        model, optimizer = made(options)
        steps(model, optimizer, 0, 1, 2)
        folder, future = saved(model, optimizer, dcp.async_save)
        steps(model, optimizer, 3, 4)
        future.result()
        again, other = loaded(folder, *made(options, factor=1.5))
        steps(again, other, 3, 4)
        same(again, model)


def check_an_optimizer_as_it_is():
    """Without names, as a Stateful: it has to have its state before."""
    for options in FORMS.values():
        model, optimizer = made(options)
        model.pop(3)  # which never has a gradient: without torch's functions only what has stepped is there
        optimizer = deepfast.AdamW(model.parameters(), lr=0.01, **options)
        steps(model, optimizer, 0, 1, 2)
        folder = Path(sys.argv[1], f"checkpoint{next(NUMBERS)}")
        dcp.save({"model": model, "optim": optimizer}, checkpoint_id=folder)
        steps(model, optimizer, 3, 4)
        again, _ = made(options, factor=1.5)
        again.pop(3)
        other = deepfast.AdamW(again.parameters(), lr=0.5, **options)
        other.init_state()
        dcp.load({"model": again, "optim": other}, checkpoint_id=folder)
        steps(again, other, 3, 4)
        same(again, model)


def check_to_torch_and_back():
    """Parameters in fp32, and in bf16, where torch's AdamW knows no master and ours begins at the weights."""
    for dtype, options, theirs in itertools.product((FP32, BF16), ({}, {"master": "fp32"}), (True, False)):
        kinds = [deepfast.AdamW, torch.optim.AdamW]
        kind, other_kind = kinds if theirs else reversed(kinds)
        model, optimizer = made({} if kind is torch.optim.AdamW else options, dtype=dtype, kind=kind)
        for p in list(model[3].parameters()):
            p.requires_grad_(False)  # of which torch's would have a state in the one that loads, and not in the other
        steps(model, optimizer, 0, 1, 2)
        folder, _ = saved(model, optimizer)
        again, other = made({} if theirs else options, dtype=dtype, kind=other_kind, factor=1.5)
        for p in list(again[3].parameters()):
            p.requires_grad_(False)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=not theirs)  # there is no master
        loaded(folder, again, other, planner=planner)
        same(again, model)
        if not theirs:
            for p in again.parameters():
                assert torch.equal(gathered(other.get_master(p)), gathered(p).float())
        steps(model, optimizer, 3), steps(again, other, 3)
        # One step: in fp32 two formulas of it, each rounded a few times; in bf16 a weight's last place, and torch's
        # moments have only 8 bits: lr/16.
        atol = 2.0**-22 if dtype == FP32 else 0.01 / 16
        for p, q in zip(weights(again), weights(model), strict=True):
            torch.testing.assert_close(p, q, rtol=0 if dtype == FP32 else 2.0**-7, atol=atol)


CHECKS = {
    **{f"the same continuation: {form}": (lambda form=form: check_the_same_continuation(form)) for form in FORMS},
    "state that is asked for is no step": check_state_that_is_asked_for_is_no_step,
    "a step from elsewhere is one": check_a_step_from_elsewhere_is_one,
    "every rank has the same keys": check_every_rank_has_the_same_keys,
    **{f"state dictionaries: {name}": (lambda name=name: check_way(name)) for name in WAYS},
    "saved beside training": check_saved_beside_training,
    "an optimizer as it is": check_an_optimizer_as_it_is,
    "to torch and back": check_to_torch_and_back,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    MESH = dist.init_device_mesh("cpu", (SIZE,))
    NUMBERS = itertools.count()
    groups = [dist.new_group(list(range(n))) for n in (2, 1)]
    SMALLER = [
        (DeviceMesh.from_group(group, "cpu") if RANK < n else None, group)
        for n, group in zip((2, 1), groups, strict=True)
    ]
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
