"""Run by test_dtensor_host.py on two ranks: who finds DTensors' gradients, and what is left of a thousand steps."""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import deepfast
from deepfast import reference
from deepfast.optim.shards import Shards

SHAPES = [(9, 6), (3, 5), (1, 4), (70, 3)]


def meshes():
    """Two, of which a parameter may lie on either."""
    one = dist.init_device_mesh("cpu", (2,))
    two = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    return (one, (Shard(0),)), (two, (Replicate(), Shard(0)))


def make(layouts, dtype=torch.float32, **options):
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES for _ in layouts]
    plain = [nn.Parameter(t.clone()) for t in whole]
    sharded = [nn.Parameter(distribute_tensor(t, *layouts[i % len(layouts)])) for i, t in enumerate(whole)]
    options = {"lr": 0.01, **options}
    return sharded, deepfast.AdamW(sharded, **options), plain, deepfast.AdamW(plain, **options)


def give(sharded, plain, seed):
    """New gradients, each a new DTensor that is laid out by the object that its parameter has: as FSDP2's are."""
    g = torch.Generator().manual_seed(seed)
    for p, q in zip(sharded, plain, strict=True):
        q.grad = torch.randn(q.shape, generator=g).to(q.dtype)
        own = distribute_tensor(q.grad, p.device_mesh, p.placements).to_local()
        p.grad = DTensor(own.clone(), p._spec, requires_grad=False)


def equal(sharded, plain, tolerance=1e-6):
    for p, q in zip(sharded, plain, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def looked_at(expected):
    """So many gradients are looked at in Python meanwhile, one after the other."""
    whose, found = Shards.local_grad, []
    Shards.local_grad = lambda self, grad: found.append(grad) or whose(self, grad)
    try:
        yield
    finally:
        Shards.local_grad = whose
    assert len(found) == expected, (len(found), expected)


def check_plans_find_new_gradients():
    for layouts in (MESHES[:1], MESHES):
        sharded, a, plain, b = make(layouts)
        for step in range(4):
            give(sharded, plain, step)
            with looked_at(0 if step else len(sharded)):
                a.step()
            b.step()
        equal(sharded, plain)


def check_plans_find_fsdp2s():
    """Its gradients, on one mesh and where ranks replicate; added up over two passes, too."""
    for mesh in (mesh for mesh, _ in MESHES):
        for passes in (1, 2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
            plain = copy.deepcopy(model)
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
            a, b = (deepfast.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, plain))
            for step in range(4):
                a.zero_grad(), b.zero_grad()
                for nth in range(passes):
                    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + nth))
                    for m in (model, plain):
                        m(x).square().mean().backward()
                with looked_at(0 if step else 4):
                    a.step()
                b.step()
            equal(model.parameters(), plain.parameters(), 1e-5)


def check_what_lies_otherwise_is_looked_at(**options):
    """Once, or as long as it does: partial sums, an equal layout, none at all, one that is still on its way."""
    mesh, placements = MESHES[0]
    sharded, a, plain, b = make(MESHES[:1], **options)
    count = len(sharded)

    def step(seed, looks, change=lambda p, q: None):
        give(sharded, plain, seed)
        change(sharded[1], plain[1])
        with looked_at(looks):
            a.step()
        b.step()
        equal(sharded, plain)
        if options:
            assert not any(bool(p.grad.full_tensor().any()) for p in sharded if p.grad is not None)

    sums = []  # one layout for all partial sums: known or not, it is not the parameter's

    def partial(p, q):
        if not sums:
            sums.append(DTensor.from_local(q.grad / 2, mesh, (Partial(),))._spec)
        p.grad = DTensor(q.grad / 2, sums[0], requires_grad=False)

    def other_object(p, q):
        p.grad = distribute_tensor(q.grad.clone(), mesh, placements)
        assert p.grad._spec is not p._spec

    def missing(p, q):
        p.grad = q.grad = None

    def on_its_way(p, q):
        coming = all_reduce(p.grad.to_local(), "sum", (MESHES[1][0], 0))  # of this rank alone
        assert isinstance(coming, AsyncCollectiveTensor)
        p.grad = DTensor(coming, p._spec, requires_grad=False)

    step(0, count)
    step(1, count, partial)
    step(2, count, partial)
    step(3, count)
    step(4, 0)
    step(5, count, other_object)
    step(6, count)  # that object is not the one of before
    step(7, 0, missing)
    step(8, 0)
    step(9, count, on_its_way)
    step(10, 0)


def check_exchanged_parameters():
    """Another shard, other memory, another tensor in the place of the parameter: the plan is made anew."""
    for dtype in (torch.float32, torch.bfloat16):
        sharded, a, plain, b = make(MESHES, dtype)
        for step in range(5):
            give(sharded, plain, step)
            with torch.no_grad():
                p, q = sharded[0], plain[0]
                if step == 1:
                    p._local_tensor = p._local_tensor.clone() * 2
                    q.mul_(2)
                elif step == 2:
                    p._local_tensor.data = p._local_tensor.clone() * 2
                    q.data = q * 2
                elif step == 3:
                    other, whole = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
                    other, whole = nn.Parameter(other), nn.Parameter(whole)
                    other.grad, whole.grad = p.grad, q.grad
                    torch.utils.swap_tensors(p, other), torch.utils.swap_tensors(q, whole)
                    del other, whole
                    gc.collect()
            a.step(), b.step()
            equal(sharded, plain, 1e-6 if dtype == torch.float32 else 1e-2)


def check_writes_are_counted():
    """Once a step, of the DTensor and of its shard, where there is a gradient; and masters see those of others."""
    for dtype, backend in ((torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "reference")):
        sharded, a, plain, b = make(MESHES, dtype, backend=backend)
        for step in range(4):
            give(sharded, plain, step)
            if step:
                sharded[1].grad = plain[1].grad = None
            before = [(p._version, p._local_tensor._version) for p in sharded]
            a.step(), b.step()
            for i, (p, (whole, shard)) in enumerate(zip(sharded, before, strict=True)):
                stepped = not step or i != 1
                assert p._version == whole + stepped
                assert (p._local_tensor._version > shard) == stepped
            with torch.no_grad():
                sharded[0].mul_(0.5), plain[0].mul_(0.5)
                sharded[2]._local_tensor.mul_(0.5), plain[2].mul_(0.5)
            equal(sharded, plain, 1e-6)
        give(sharded, plain, 4)
        a.step(), b.step()
        equal(sharded, plain, 1e-6)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_nothing_is_left_of_steps():
    """A thousand, with new gradients each: no object, no memory more."""
    for layouts in (MESHES[:1], MESHES):
        sharded, a, plain, _ = make(layouts, torch.bfloat16)
        give(sharded, plain, 0)
        locals_ = [p.grad.to_local() for p in sharded]

        def steps(count, sharded=sharded, locals_=locals_, a=a):
            for _ in range(count):
                for p, t in zip(sharded, locals_, strict=True):
                    p.grad = DTensor(t.clone(), p._spec, requires_grad=False)
                a.step()
            gc.collect()
            kinds = [issubclass(type(o), torch.Tensor) for o in gc.get_objects()]
            return sum(kinds), len(kinds), resident()

        steps(200)
        plans = [launch._plan for launch in a._launches]
        with looked_at(0):
            before, after = steps(5), steps(1000)
        assert all(launch._plan is plan for launch, plan in zip(a._launches, plans, strict=True))
        assert after[0] == before[0]
        assert after[1] <= before[1] + 2, (before, after)  # this list of numbers
        assert after[2] < before[2] + (1 << 20), (before, after)  # a word for each gradient of them would be less


def check_state_is_copied_and_lies_as_the_parameter():
    """Each has memory of its own, and no more than it needs; and nobody's layout but its own."""
    for dtype in (torch.float32, torch.bfloat16):
        sharded, a, plain, _ = make(MESHES, dtype)
        give(sharded, plain, 0)
        a.step()
        copied = copy.deepcopy(a.state_dict())["state"]
        for nth, p in enumerate(sharded):
            for name, value in a.state[p].items():
                if name == "step":
                    continue
                assert value.placements == p.placements
                assert (value.shape, value.stride()) == (p.shape, p.stride())
                assert value._spec.tensor_meta.dtype == value.dtype == value.to_local().dtype
                own = value._local_tensor
                assert own.storage_offset() == 0
                assert own.untyped_storage().nbytes() <= max(own.nbytes, 64) + 64
                if name != "master":
                    assert torch.equal(copied[nth][name].full_tensor(), value.full_tensor())
            assert p._spec.tensor_meta.dtype == dtype


def check_a_class_that_hides_them():
    """Where the plan does not see the slots, Python looks at each step."""
    sharded, a, plain, b = make(MESHES[:1])
    give(sharded, plain, 0)
    a.step(), b.step()
    (launch,) = a._launches
    layouts = list(map(id, launch._layouts))
    p = sharded[0]
    known = id(type(p)), type(p).__basicsize__, id(p._spec)
    for wrong in ((0, *known[1:]), (known[0], 16, known[2]), (*known[:2], 1)):
        launch._plan.expect(layouts, *wrong)
        assert launch._plan.gather([], reference.KEPT) == -2
    launch._plan.expect([0] * len(layouts), *known)
    assert launch._plan.gather([], reference.KEPT) == -2
    launch._plan.expect(layouts, *known)
    assert launch._plan.gather([], reference.KEPT) == len(sharded)
    give(sharded, plain, 1)
    launch._plan.expect(layouts, 0, 0, 0)
    with looked_at(len(sharded)):
        a.step()
    b.step()
    equal(sharded, plain)


def check_what_lies_otherwise_is_reset():
    check_what_lies_otherwise_is_looked_at(reset_grad=True)


CHECKS = {name.removeprefix("check_"): f for name, f in list(vars().items()) if name.startswith("check_")}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    RANK = dist.get_rank()
    MESHES = meshes()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
