"""The step on DTensors, where the host decides: the first, and those that follow.

Each has four elements, all are in a process group of one. Where a case says so, every other one is on another mesh.
"""

from __future__ import annotations

import functools
import gc
import tempfile

import measure
import pytest
import torch.distributed as dist
from bench_step import ADAMW, HOST
from measure import BLOCK, Case
from torch import Tensor


@functools.cache
def meshes() -> tuple[dist.DeviceMesh, dist.DeviceMesh]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        return tuple(dist.init_device_mesh("cpu", shape) for shape in ((1,), (1, 1)))


def on_one(local: Tensor, nth: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, meshes()[0], [Shard(0)], run_check=False)


def on_two(local: Tensor, nth: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if nth % 2 == 0:
        return on_one(local, nth)
    return DTensor.from_local(local, meshes()[1], [Replicate(), Shard(0)], run_check=False)


def case(title: str, count: int, wrapped, *names: str) -> Case:
    contenders = {name: ADAMW[name] for name in names}
    return Case(title, contenders=contenders, shapes=((4,),) * count, wrapped=wrapped, **HOST)


# torch's first fused or foreach step over DTensors takes a time that grows with their number's square: 7 and 25 s at
# 1000, a quarter of an hour at 10,000.
LOOP = "deepfast", "torch_loop"
FUSED = *LOOP, "torch_fused"
CASES = {
    "1000": case("AdamW, fp32, 1000 DTensors of 4", 1000, on_one, *FUSED),
    "1000_on_two": case("AdamW, fp32, 1000 DTensors of 4 on two meshes", 1000, on_two, *FUSED),
    "10000": case("AdamW, fp32, 10,000 DTensors of 4", 10_000, on_one, *LOOP),
    "10000_on_two": case("AdamW, fp32, 10,000 DTensors of 4 on two meshes", 10_000, on_two, *LOOP),
}
# Other numbers than those above: what torch has found out about as many it keeps.
FIRST = {
    "300": case("first step of AdamW, fp32, 300 DTensors of 4", 300, on_one, *FUSED, "torch_foreach"),
    "9000": case("first step of AdamW, fp32, 9000 DTensors of 4", 9000, on_one, *LOOP),
}


@pytest.fixture(autouse=True, scope="module")
def _one_rank():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def each(cases: dict[str, Case]):
    return pytest.mark.parametrize(
        ("case", "contender"),
        [pytest.param(case, name, id=f"{case}-{name}") for case in cases for name in cases[case].contenders],
    )


@each(CASES)
def test_step(benchmark, case, contender):
    measure.contest(benchmark, CASES[case], contender, BLOCK)
    gc.collect()


@each(FIRST)
def test_first_step(benchmark, case, contender):
    """State is made in it, too."""
    measure.contest_once(benchmark, FIRST[case], contender)
    gc.collect()
