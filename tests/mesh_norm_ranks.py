"""Run by test_mesh_norms.py on four ranks: one norm over all meshes, against one plain optimizer over whole tensors."""

from __future__ import annotations

import contextlib
import copy
import datetime
import pickle
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import OURS, TYPICAL
from checks import run_checks
from conftest import HANGS
from meshes import Meshes, World, same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

ALL = ["rows", "hsdp", "fsdp and tp", "plain", "columns", "expert", "beside tp", "tp", "expert alone", "replicas",
       "plain part", "plain parts"]  # fmt: skip
MIXES = {
    "one mesh": (["rows", "columns", "replicas", "rows"], 1),
    "HSDP": (["hsdp", "hsdp"], 1),
    "FSDP and TP": (["fsdp and tp", "tp", "beside tp", "fsdp and tp"], 1),
    "dense and HSDP": (["rows", "hsdp"], 1),
    "dense and plain": (["plain", "rows", "plain"], 1),
    "dense and experts": (["rows", "expert", "rows", "expert"], 1),
    "experts only": (["expert"], 1),
    "experts on meshes of their own": (["expert alone", "rows"], 1),
    "nothing but those": (["expert alone"], 2),  # no group has all ranks
    "parts by hand": (["plain part", "plain"], 1),
    "different everywhere": (["plain parts"], 1),
    "all": (ALL, 1),
}


@contextlib.contextmanager
def counted():
    """How many sums over ranks there are, and of how many elements."""
    sizes, all_reduce = [], dist.all_reduce

    def count(t, *args, **kwargs):
        sizes.append(t.numel())
        return all_reduce(t, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", count):
        yield sizes


def make(ways, name="AdamW", said=True, dtype=torch.float32, **options):
    """In two groups, of different learning rates."""
    world = World(MESHES, ways, dtype)
    halves = []
    for params in (world.params, world.whole):
        cut = len(world.params) // 2 if params is world.params else world.mine[len(world.params) // 2]
        groups = [{"params": params[:cut], "lr": 0.03}, {"params": params[cut:], "lr": 0.01}]
        groups = [group for group in groups if group["params"]]
        halves.append(OURS[name](groups, lr=0.01, **{**TYPICAL[name], **options}))
    if said:
        world.say(halves[0])
    return world, *halves


def check_follow_one_process(mix, name="AdamW", **options):
    ways, collectives = MIXES[mix]
    world, a, b = make(ways, name, max_grad_norm=0.5, **options)
    for step, placed in enumerate(("", "replicas", "partial", "", "")):
        without = (len(ways) - 1,) if step == 3 and len(ways) > 1 and world.ways[-1][2] is None else ()
        world.give(step, scale=10.0**step, without=without, placed=placed)
        with counted() as sizes:
            a.step()
        b.step()
        if name != "LAMB" and placed != "partial":
            assert sizes == [3] * collectives, sizes
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        assert same_bits(a.grad_norm)
    world.differ(1e-5)


def check_torch_agrees_on_one_mesh():
    """And raises, or is wrong, on several."""
    for mesh in (MESHES.flat, MESHES.ways["hsdp"][0]):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5))
            for layer in (*model, model):
                fully_shard(layer, mesh=mesh)
            models.append(model)
        optimizers = [OURS["SGD"](models[0].parameters(), lr=0.1, max_grad_norm=0.1),
                      torch.optim.SGD(models[1].parameters(), lr=0.1)]  # fmt: skip
        for step in range(3):
            for model in models:
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4 * step + RANK))
                model.zero_grad()
                model(x).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(models[1].parameters(), 0.1).full_tensor()
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(optimizers[0].grad_norm, norm, rtol=1e-6, atol=0)
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
                torch.testing.assert_close(p.to_local(), q.to_local(), rtol=1e-5, atol=1e-7)
    for mix in ("dense and HSDP", "dense and plain", "FSDP and TP"):
        world, a, _ = make(MIXES[mix][0], max_grad_norm=0.5)
        world.give(0)
        with pytest.raises(RuntimeError):
            nn.utils.clip_grad_norm_(world.params, 0.5)
        a.step()
    for mix in ("experts only", "different everywhere", "nothing but those"):
        world, a, b = make(MIXES[mix][0], max_grad_norm=0.5)
        world.give(0)
        a.step(), b.step()
        norm = nn.utils.clip_grad_norm_(world.params, 0.5)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        assert norm < 0.9 * b.grad_norm  # of this rank's own alone
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)


def check_a_rank_without_gradients_takes_part():
    """An expert that has seen no token, from the first step on or later."""
    for first in (0, 1):
        world, a, b = make(["plain parts", "expert alone"], max_grad_norm=0.5)
        for step in range(4):
            world.give(step)
            if step % 2 == first:
                if RANK in (1, 3):
                    for p in world.params:
                        p.grad = None
                for missing in (1, 3, 4 + 1):  # their parts, and the expert that they share
                    world.whole[missing].grad = None
            with counted() as sizes:
                a.step()
            b.step()
            assert sizes == [3]
            assert same_bits(a.grad_norm)
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        world.differ(1e-5)
    world, a, _ = make(["plain parts"], max_grad_norm=0.5)
    a.step()
    assert a.grad_norm == 0
    world, a, _ = make(["plain"], max_grad_norm=0.5)
    a.step()
    assert a.grad_norm is None  # this rank alone: nothing to do


def check_no_host_sync():
    world, a, _ = make(ALL, max_grad_norm=0.5)

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    for step in range(3):
        world.give(step)
        names = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")
        with contextlib.ExitStack() as stack:
            for name in names if step else ():  # a plan may look at what it plans
                stack.enter_context(mock.patch.object(torch.Tensor, name, refuse))
            a.step()


def check_no_copy_of_a_gradient():
    world = World(MESHES, ALL)
    world.params = [
        nn.Parameter(world.cut(i, torch.randn(256, 256))) if i % 2 else p for i, p in enumerate(world.params)
    ]
    a = OURS["AdamW"](world.params, lr=0.01, max_grad_norm=0.5)
    world.say(a)
    for step in range(3):
        for p in world.params:
            p.grad = p.detach().clone()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            a.step()
        asked = [event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0]
        assert asked
        if step:
            smallest = min(p._local_tensor.nbytes for p in world.params[1::2] if hasattr(p, "_local_tensor"))
            assert max(asked) < smallest / 16, (max(asked), smallest)
            assert sum(asked) < smallest, (sum(asked), smallest)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "distinct_over" in str(w.message)]


def check_what_is_not_said():
    """Ranks that are taken to hold the same and do not: all have one norm, and the first of them are told; once."""
    for ways, told in ((["rows", "expert"], (0, 1)), (["rows", "plain part"], (0,)), (["rows", "plain"], ()),
                       (["beside tp", "rows"], ()), (["rows", "hsdp", "tp"], ())):  # fmt: skip
        world, a, _ = make(ways, said=False, max_grad_norm=0.5)
        said = []
        for step in range(3):
            world.give(step)
            if step == 0:  # in an overflow nothing can be seen
                world.params[0].grad._local_tensor.fill_(float("nan"))
            said.append(len(warned(a.step)))
            assert step == 0 or same_bits(a.grad_norm)
        assert said == [0, int(RANK in told), 0], (ways, said)


def check_a_mesh_of_its_own_needs_no_word():
    world, a, b = make(MIXES["experts on meshes of their own"][0], said=False, max_grad_norm=0.5)
    for step in range(3):
        world.give(step)
        assert not warned(a.step)
        b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        assert same_bits(a.grad_norm)
    world.differ(1e-5)


def check_a_mesh_that_not_all_ranks_are_in():
    """The others have empty tensors, and take part where a larger mesh does."""
    few = DeviceMesh("cpu", [0, 2])
    shapes = [(5, 3), (3, 4)]
    for step in range(3):
        values = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for shape in shapes]
        if step == 0:
            whole = [nn.Parameter(value.clone()) for value in values]
            params = [nn.Parameter(distribute_tensor(value, mesh, (Shard(0),)))
                      for value, mesh in zip(values, (few, MESHES.flat), strict=True)]  # fmt: skip
            a, b = (OURS["AdamW"](some, lr=0.01, max_grad_norm=0.5) for some in (params, whole))
        for p, q, value in zip(params, whole, values, strict=True):
            q.grad, p.grad = value, distribute_tensor(value, p.device_mesh, (Shard(0),))
        with counted() as sizes:
            a.step()
        b.step()
        assert sizes == [3]
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        assert same_bits(a.grad_norm)
    torch.testing.assert_close(params[1].full_tensor(), whole[1].detach(), rtol=1e-5, atol=1e-6)


def check_fully_shard_over_tensor_parallel_layers():
    """As torch composes them: strided shards, and a layer of plain replicas over "tp"."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6))

    model, one = net(), net()
    parallelize_module(model, MESHES.tp["tp"], {"0": ColwiseParallel(output_layouts=Replicate()),
                                                "2": RowwiseParallel(input_layouts=Replicate())})  # fmt: skip
    for layer in (*model, model):
        fully_shard(layer, mesh=MESHES.tp["dp"])
    assert {p.device_mesh.ndim for p in model.parameters()} == {1, 2}
    a, b = (OURS["AdamW"](m.parameters(), lr=0.01, max_grad_norm=0.05) for m in (model, one))
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        mine = x.chunk(2)[MESHES.tp.get_local_rank("dp")]
        for m, batch in ((model, mine), (one, x)):
            m.zero_grad()
            (m(batch) - batch).square().mean().backward()
        with counted() as sizes:
            assert not warned(a.step)
        b.step()
        assert sizes == [3]
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
        assert same_bits(a.grad_norm)
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-4, atol=1e-5)


def check_what_is_said():
    world, a, b = make(["plain part", "plain"], said=False, max_grad_norm=0.5)
    group = MESHES.tp["tp"]
    for wrong, why in ((MESHES.tp, r"one dimension.*mesh\['name'\].*got 2"), (3, "group of ranks.*got 3"),
                       (dist.GroupMember.NON_GROUP_MEMBER, "group of ranks that this rank is one of")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            a.distinct_over(wrong)
    with pytest.raises(ValueError, match=r"shape \(2,\) is not this optimizer's"):
        a.distinct_over(group, [nn.Parameter(torch.zeros(2))])
    norms = []
    for said in (None, lambda: a.distinct_over(group, world.params[0]), lambda: a.distinct_over(group.get_group())):
        if said is not None:
            said()  # the plan is there already
        world.give(7)
        a.step()
        norms.append(a.grad_norm.item())
    b.step()
    squares = [sum(float(world.whole[i].grad.square().sum()) for i in some)
               for some in ((world.mine[0], 2), (0, 1, 2), (0, 1, 2, 2))]  # fmt: skip
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(squares).sqrt(), rtol=1e-6, atol=0)
    assert "distinct" not in str(a.state_dict())
    assert all("distinct" not in key for g in a.param_groups for key in g)
    pickle.dumps(a.state_dict())
    for other, knows in ((copy.deepcopy(a), True), (copy.copy(a), True), (pickle.loads(pickle.dumps(a)), False)):  # noqa: S301
        for p, q in zip(other.param_groups[0]["params"] + other.param_groups[1]["params"], world.params, strict=True):
            p.grad = q.grad.clone()
        other.step()
        torch.testing.assert_close(other.grad_norm.item(), norms[2] if knows else norms[0], rtol=1e-6, atol=0)
    later = nn.Parameter(torch.zeros(3))
    a.add_param_group({"params": [later]})  # said of all: of this one, too
    for p in world.params:
        p.grad = None
    later.grad = torch.full((3,), float(1 + dist.get_rank(group.get_group())))
    a.step()
    torch.testing.assert_close(a.grad_norm, torch.tensor(15.0).sqrt())


CHECKS = {
    **{f"follow one process, {mix}": (lambda mix=mix: check_follow_one_process(mix)) for mix in MIXES},
    "follow one process, in plain torch": lambda: check_follow_one_process("all", backend="reference"),
    "follow one process, LAMB": lambda: check_follow_one_process("all", "LAMB", phi=(0.5, 2.0)),
    "torch agrees on one mesh": check_torch_agrees_on_one_mesh,
    "a rank without gradients takes part": check_a_rank_without_gradients_takes_part,
    "no host sync": check_no_host_sync,
    "no copy of a gradient": check_no_copy_of_a_gradient,
    "what is not said": check_what_is_not_said,
    "a mesh of its own needs no word": check_a_mesh_of_its_own_needs_no_word,
    "a mesh that not all ranks are in": check_a_mesh_that_not_all_ranks_are_in,
    "fully_shard over tensor parallel layers": check_fully_shard_over_tensor_parallel_layers,
    "what is said": check_what_is_said,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    RANK = dist.get_rank()
    MESHES = Meshes()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
