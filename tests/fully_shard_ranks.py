"""Run by test_fully_shard.py on four ranks: torch's fully_shard in all its forms, each beside one process."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from beside_whole import EXACT, batch, follow, gathered, loss_of, net, sharded_backward, whole_backward
from checks import run_checks
from comm_world import mapped
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import deepfast

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVEN = {"widths": (16, 16, 16), "bias": False}  # each rank has 64 elements of each weight, a group of 8 bits


def made(dtype=FP32, compute=None, reduce=None, mesh=None, kind=None, **options):
    model = net(dtype, **(kind or {}))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh or MESH, mp_policy=policy, **options)
    return model


def beside(dtype, compute, reduce, bits, how=None, kind=None, model=None, **options):
    """``made`` that, beside one process."""
    model = model or made(dtype, compute, reduce, kind=kind, **(how or {}))
    plain = net(dtype, **(kind or {}))
    width = plain[0].in_features
    return follow(
        model,
        plain,
        lambda x, scale: sharded_backward(model, x, RANK, SIZE, scale),
        lambda x, scale: whole_backward(plain, x, SIZE, compute, reduce, scale),
        bits,
        scaled=FP16 in (dtype, compute),
        inputs=lambda step: batch(step, width),
        **options,
    )


# fp32 parameters: which type computes, which adds up, and how many bits of the sum are sure.
PRECISIONS = {
    "fp32": (None, None, 24),
    "fp16, sums fp32": (FP16, FP32, EXACT),
    "fp16": (FP16, FP16, 11),
    "bf16, sums fp32": (BF16, FP32, EXACT),
    "bf16": (BF16, BF16, 8),
}
# 16-bit parameters: their type, and how the optimizer keeps what they lack.
FORMS = {
    "bf16, split": (BF16, {"master": "split"}),
    "bf16, fp32 master": (BF16, {"master": "fp32"}),
    "bf16, no master": (BF16, {"master": "none"}),
    "bf16, by chance": (BF16, {"master": "none", "rounding": "stochastic"}),
    "bf16, bf16 moments": (BF16, {"state_dtype": "bf16"}),
    "bf16, int8 moments": (BF16, {"state_dtype": "int8"}),
    "fp16, split": (FP16, {"master": "split"}),
    "fp16, fp32 master": (FP16, {"master": "fp32"}),
}


def check_precision(name):
    compute, reduce, bits = PRECISIONS[name]
    beside(FP32, compute, reduce, bits)


def check_form(name):
    dtype, options = FORMS[name]
    kind = EVEN if "int8" in options.values() else None
    a, _ = beside(dtype, None, FP32, EXACT, kind=kind, **options)
    kept = {t.dtype for state in a.state.values() for key, t in state.items() if key == "master"}
    assert kept == {"split": {torch.int16}, "fp32": {FP32}, "none": set()}[options.get("master", "split")]


def check_resharding_after_forward():
    for reshard in (True, False, 2):
        beside(FP32, BF16, FP32, EXACT, {"reshard_after_forward": reshard})


def check_hsdp():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for reshard in (True, False, 2):
        for dtype, compute in ((FP32, FP16), (BF16, None)):
            beside(dtype, compute, FP32, EXACT, {"mesh": mesh, "reshard_after_forward": reshard})
    with pytest.raises(ValueError, match="factor of 2, not 3"):  # torch's
        made(mesh=mesh, reshard_after_forward=3)


def check_columns():
    def columns(p):
        return Shard(1) if p.dim() == 2 else Shard(0)

    kind = {"widths": (8, 12, 4)}
    a, _ = beside(FP32, BF16, FP32, EXACT, {"shard_placement_fn": columns}, kind)
    assert [p.placements for p in a.state] == [(Shard(1),), (Shard(0),)] * 2


def check_offload_to_the_cpu():
    for dtype, compute in ((FP32, FP16), (BF16, None)):
        beside(dtype, compute, FP32, EXACT, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})


def check_offload_from_another_device():
    """Parameters lie on the CPU while their mesh is of GPUs: so does their state, and what is loaded into it."""
    for dtype, options in ((FP32, {}), (BF16, {}), (FP16, {"state_dtype": "int8"})):
        model = made(dtype, offload_policy=CPUOffloadPolicy(pin_memory=False))
        optimizer, scaler = deepfast.AdamW(model.parameters(), max_grad_norm=1.0, **options), deepfast.LossScaler()
        sharded_backward(model, batch(0), RANK, SIZE, scaler.scale)
        meshes = {id(p.device_mesh): p.device_mesh for p in model.parameters()}.values()
        try:
            for mesh in meshes:
                mesh._device_type = "cuda"  # of which there is none: whatever goes there fails
            scaler.step(optimizer)
            scaler.update()
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for mesh in meshes:
                mesh._device_type = "cpu"
        assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {"cpu"}


def by_hand(model, plain, bits=EXACT, dtype=None, **options):
    """The same with gradients that are given to both: nothing may differ, however the parameters are cut."""

    def give(m):
        def backward(x, scale):
            g = torch.Generator().manual_seed(int(x.sum() * 1e6))
            for p in m.parameters():
                grad = scale(torch.randn(p.shape, generator=g)).to(dtype or p.dtype)
                sharded = hasattr(p, "placements")
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if sharded else grad
            return torch.zeros(())

        return backward

    return follow(model, plain, give(model), give(plain), bits, **options)


def tensor_parallel(dtype, mesh):
    model = parallelize_module(net(dtype, (8, 12, 4)), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["data"])
    return model


def check_tensor_parallel():
    """In fp32; of 16 bits a part of a sum over ranks is rounded, as no one process does: there with given gradients."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, plain = tensor_parallel(FP32, mesh), net(FP32, (8, 12, 4))
    assert "StridedShard" in str(model[0].weight.placements)
    follow(
        model,
        plain,
        lambda x, scale: sharded_backward(model, x, RANK // 2, 2, scale),
        lambda x, scale: whole_backward(plain, x, 2, None, None, scale),
        24 - 1,  # the second layer's product is a sum over ranks, too
        inputs=lambda step: batch(step, 8),
    )
    for options in ({}, {"master": "fp32"}, {"master": "none"}, {"state_dtype": "bf16"}):
        by_hand(tensor_parallel(BF16, mesh), net(BF16, (8, 12, 4)), **options)
    by_hand(tensor_parallel(FP16, mesh), net(FP16, (8, 12, 4)), scaled=True)
    # By chance an element is rounded by its place, which is that of its row: not where columns are cut.
    rows = [tensor_parallel(BF16, mesh)[0], net(BF16, (8, 12, 4))[0]]
    by_hand(*rows, master="none", rounding="stochastic")


class Model(nn.Module):
    """Experts whose first dimension is dealt out, and something dense."""

    def __init__(self, dtype):
        super().__init__()
        self.experts = nn.Module()
        g = torch.Generator().manual_seed(3)
        self.experts.up = nn.Parameter(torch.randn(4, 6, 5, generator=g).to(dtype))
        self.experts.down = nn.Parameter(torch.randn(4, 5, 6, generator=g).to(dtype))
        self.dense = net(dtype)


def check_experts():
    """Each pair of ranks has its own experts, fully_shard-ed beside that; the rest is sharded over all ranks."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    for dtype, options in ((FP32, {}), (BF16, {}), (FP16, {"scaled": True}), (BF16, {"master": "fp32"})):
        model = Model(dtype)
        for name, p in list(model.experts.named_parameters()):
            setattr(model.experts, name, nn.Parameter(distribute_tensor(p.data, mesh["experts"], [Shard(0)])))
        fully_shard(model.experts, mesh=mesh["data"])
        fully_shard(model.dense, mesh=MESH)
        meshes = {p.device_mesh.ndim for p in model.parameters()}
        assert meshes == {1, 2}
        flat = [nn.ParameterList(sorted(m.parameters(), key=lambda p: p.dim() == 3)) for m in (model, Model(dtype))]
        by_hand(*flat, **options)


def check_wide_gradients():
    """fp32 gradients of 16-bit parameters: fully_shard itself makes those of the parameter's type, and says so."""
    for form in ({}, {"master": "fp32"}, {"master": "none"}):
        model, plain = made(BF16), net(BF16)
        for p in (*model.parameters(), *plain.parameters()):
            p.grad_dtype = FP32
        by_hand(model, plain, dtype=FP32, **form)
        model.zero_grad()
    with pytest.raises(RuntimeError, match="attempting to assign a gradient with dtype 'c10::BFloat16'"):
        sharded_backward(model, batch(0), RANK, SIZE)


def check_in_deepfasts_memory():
    deepfast.comm.register_backend()
    group = dist.new_group(backend="deepfast")
    mesh = DeviceMesh.from_group(group, "cpu")
    for reduce, bits in ((None, 24), (FP32, EXACT)):
        model = made(FP32, BF16 if reduce else None, reduce, mesh)
        for layer in (model[0], model[2]):  # torch: of each by itself
            layer.set_allocate_memory_from_process_group_for_comm(True)
        beside(FP32, BF16 if reduce else None, reduce, bits, model=model)
    comms = model[0]._get_fsdp_state()._fsdp_param_groups[0]
    for comm in (comms._all_gather_comm, comms._reduce_scatter_comm):
        assert mapped(comm.allocate((4,), dtype=FP32, device=torch.device("cpu")).data_ptr())
    layer = made(mesh=mesh)[0]
    layer.set_custom_all_gather(object())
    with pytest.raises(AssertionError, match="when all gather comm is custom"):  # torch's: one or the other
        layer.set_allocate_memory_from_process_group_for_comm(True)


def check_compiled():
    """Blocks, a whole module, the step, and a function that trains: all as when they are not."""
    seen = {}
    for what in ("nothing", "blocks", "module", "step", "training"):
        torch._dynamo.reset()
        model = made(FP32, BF16, FP32)
        optimizer = deepfast.AdamW(model.parameters(), lr=0.01, max_grad_norm=0.5)
        for block in model if what == "blocks" else ():
            block.compile(backend="aot_eager")
        forward = torch.compile(model, backend="aot_eager") if what == "module" else model
        step = torch.compile(optimizer.step) if what == "step" else optimizer.step

        def train(x, forward=forward, step=step, optimizer=optimizer):
            loss = loss_of(forward(x))
            loss.backward()
            step()
            optimizer.zero_grad()
            return loss.detach()

        if what == "training":
            train = torch.compile(train, backend="aot_eager")
        losses = [train(batch(i).chunk(SIZE)[RANK]).item() for i in range(4)]
        assert {state["step"].item() for state in optimizer.state.values()} == {4.0}
        seen[what] = losses, [gathered(p) for p in model.parameters()], optimizer.grad_norm
    for losses, weights, norm in seen.values():
        expected = seen["nothing"]
        assert (losses, norm) == (expected[0], expected[2])
        assert all(map(torch.equal, weights, expected[1]))


CHECKS = {
    **{f"fp32 parameters: {name}": (lambda name=name: check_precision(name)) for name in PRECISIONS},
    **{f"parameters and state: {name}": (lambda name=name: check_form(name)) for name in FORMS},
    "resharding after forward": check_resharding_after_forward,
    "HSDP": check_hsdp,
    "columns": check_columns,
    "offload to the CPU": check_offload_to_the_cpu,
    "offload from another device": check_offload_from_another_device,
    "tensor parallel": check_tensor_parallel,
    "experts": check_experts,
    "wide gradients": check_wide_gradients,
    "in deepfast's memory": check_in_deepfasts_memory,
    "compiled": check_compiled,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    MESH = dist.init_device_mesh("cpu", (SIZE,))
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
