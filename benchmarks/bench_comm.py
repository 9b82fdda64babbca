"""All-reduce between ranks of one machine: ours, gloo's and DeepSpeed's through shared memory; or, where there are
several GPUs, between those: ours and NCCL's, from ordinary and from its symmetric memory.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest benchmarks/bench_comm.py    [--device cuda]

Every rank goes through the same rounds, and a round takes as long as its slower rank: the clock is told so. The
yardstick is a local copy of as many bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable

import measure
import pytest
import torch
import torch.distributed as dist
from ranks import BUCKET, COMMAND, DTYPES, RANKS, Given, Ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import deepfast.comm

CONTENDERS = {
    "cpu": ("deepfast", "deepfast_ordinary", "gloo", "deepspeed"),
    "cuda": ("deepfast", "deepfast_ordinary", "nccl", "nccl_symmetric"),
}
# name: bytes, tensors that take turns, calls a round, rounds
SIZES = {
    "1KiB": (1 << 10, 1, 200, 21),
    "4KiB": (4 << 10, 1, 200, 21),
    "64KiB": (64 << 10, 1, 100, 21),
    "1MiB": (1 << 20, 1, 20, 21),
    "4MiB": (4 << 20, 1, 8, 15),
    "25MiB": (BUCKET, 1, 4, 15),
    "25MiB_rotating": (BUCKET, 21, 21, 7),  # over 512 MiB: as in DDP's life, no cache has it
    "256MiB": (256 << 20, 1, 1, 7),
}


class Reducers:
    """Who sums, on one rank."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.found: dict[str, Callable[[Tensor], object]] = {
            **dict.fromkeys(("deepfast", "deepfast_ordinary"), ranks.comm.all_reduce_),
            **dict.fromkeys(("gloo", "nccl", "nccl_symmetric"), dist.all_reduce),
        }
        self.symmetric: Callable[[int, torch.dtype], Tensor] | None = None

    def of(self, name: str) -> Callable[[Tensor], object]:
        """This contender's; a skip where it is not there."""
        try:
            if name == "deepspeed" and name not in self.found:
                self.found[name] = deepspeeds(self.ranks.comm.rank)
            if name == "nccl_symmetric" and self.symmetric is None:
                self.symmetric = symmetric_memory(self.ranks.device)
        except (ImportError, NotImplementedError, RuntimeError) as problem:
            measure.absent(name, problem)
        return self.found[name]

    def memory(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        if name == "deepfast":
            return self.ranks.comm.empty(numel, dtype, self.ranks.device).zero_()
        if name == "nccl_symmetric":
            return self.symmetric(numel, dtype)
        return torch.zeros(numel, dtype=dtype, device=self.ranks.device)


@pytest.fixture(scope="module")
def reducers(ranks) -> Reducers:
    return Reducers(ranks)


def timed(benchmark, ranks: Ranks, run: measure.Step, size: int, calls: int, rounds: int) -> None:
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=ranks.device)

    def again() -> None:  # the contender's memory is in the caches again, as far as they hold it
        for _ in range(calls):
            run()

    copy = measure.Yardstick(lambda: target.copy_(source), size)
    ranks.timed(benchmark, run, size, rounds, copy, again, calls)


def pytest_generate_tests(metafunc):
    """The contenders are those of the device."""
    names = CONTENDERS[metafunc.config.getoption("--device")]
    if metafunc.function is test_all_reduce:
        cases = [(dtype, size, name) for dtype in DTYPES for size in SIZES for name in names]
        metafunc.parametrize(("dtype", "size", "contender"), cases, ids=map("-".join, cases))


@pytest.mark.benchmark(timer=measure.told)
def test_all_reduce(benchmark, ranks, reducers, dtype, size, contender):
    """Zeros, whose sum may be taken again and again."""
    kind, (bytes_each, count, calls, rounds) = DTYPES[dtype], SIZES[size]
    reduce, numel = reducers.of(contender), bytes_each // kind.itemsize
    tensors = [reducers.memory(contender, numel, kind) for _ in range(count)]
    parts = [torch.arange(numel, dtype=torch.int32).add_(r).remainder_(17).to(kind) for r in range(RANKS)]
    t = tensors[0].copy_(parts[ranks.comm.rank])
    reduce(t)
    ranks.check(torch.equal(t.cpu(), sum(parts[1:], parts[0])), contender)
    t.zero_()
    del parts
    turns = itertools.cycle(tensors)
    text = re.sub(r"(\d+)", r"\1 ", size).replace("_", ", ")
    benchmark.group = f"all-reduce, {ranks.device.type}, {dtype}, {text}"
    timed(benchmark, ranks, lambda: reduce(t) if count == 1 else reduce(next(turns)), bytes_each, calls, rounds)


@pytest.mark.parametrize("contender", ["deepfast_ordinary", "gloo"])
@pytest.mark.benchmark(timer=measure.told)
def test_ddp_hook(benchmark, ranks, contender):
    """The hook alone, one bucket of 25 MiB in ordinary memory."""
    buckets: list[dist.GradBucket] = []

    def keep(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket)
        return deepfast.comm.allreduce_hook(ranks.comm, bucket)

    keep.__annotations__ = {}  # as text DDP does not know them
    ddp(ranks, hook=keep)
    bucket = buckets[-1]
    assert bucket.is_last()
    assert bucket.buffer().nbytes == BUCKET
    hooks = {
        "deepfast_ordinary": lambda: deepfast.comm.allreduce_hook(ranks.comm, bucket).wait(),
        "gloo": lambda: default_hooks.allreduce_hook(None, bucket).wait(),
    }
    benchmark.group = "DDP's hook, cpu, fp32, 25 MiB"
    timed(benchmark, ranks, hooks[contender], BUCKET, *SIZES["25MiB"][2:])


@pytest.mark.parametrize("contender", ["deepfast", "deepfast_ordinary", "gloo"])
@pytest.mark.benchmark(timer=measure.told)
def test_ddp_backward(benchmark, ranks, contender):
    """The backward pass around it, from gradients that cost nothing."""
    if contender == "deepfast":
        model = ddp(ranks, dist.new_group(backend="deepfast"))  # buckets in our memory
    elif contender == "deepfast_ordinary":
        model = ddp(ranks, None, ranks.comm, deepfast.comm.allreduce_hook)
    else:
        model = ddp(ranks)
    benchmark.group = "DDP's backward pass, cpu, fp32, 25 MiB"
    timed(benchmark, ranks, lambda: model().backward(), BUCKET, *SIZES["25MiB"][2:])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4, 8])
def test_several_gpus(count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    _, *rest = COMMAND.format(count, "bench_comm.py").split()
    launch = [sys.executable, "-m", "torch.distributed.run", *rest, "--device", "cuda", "-k", "all_reduce"]
    subprocess.run(launch, check=True)


def ddp(
    ranks: Ranks, group: dist.ProcessGroup | None = None, state: object = None, hook: Callable | None = None
) -> nn.Module:
    if ranks.device.type == "cuda":
        pytest.skip("DDP is measured between CPU ranks only")
    weights, grads = ([torch.full((BUCKET // 4 // 5,), float(x)) for _ in range(5)] for x in (0, dist.get_rank()))
    model = nn.parallel.DistributedDataParallel(Given(weights, grads), process_group=group, bucket_cap_mb=100)
    if hook:
        model.register_comm_hook(state, hook)
    for _ in range(3):  # DDP arranges its buckets after the first
        model.zero_grad()
        model().backward()
    ranks.check(all(bool((p.grad == (RANKS - 1) / 2).all()) for p in model.parameters()), "DDP")  # the mean over ranks
    return model


def deepspeeds(rank: int) -> Callable[[Tensor], object]:
    """DeepSpeed's all-reduce of CPU tensors, where it takes the way through shared memory."""
    os.environ["LOCAL_SIZE"] = str(RANKS)  # else it crashes at the first call
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]  # ninja
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    for turn in range(RANKS):  # the first compiles it, the others find it
        if turn == rank:
            module = ShareMemCommBuilder().load(verbose=False)
        dist.barrier()
    module.initialize(RANKS, rank)
    dist.barrier()
    address = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    with contextlib.suppress(FileNotFoundError):  # it never removes its memory's name; mapped, it stays
        os.unlink(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{rank}")  # noqa: S108
    return torch.ops.deepspeed.inference_all_reduce_


def symmetric_memory(device: torch.device) -> Callable[[int, torch.dtype], Tensor]:
    """Zeros in memory that NCCL's symmetric kernels take."""
    backend = dist.group.WORLD._get_backend(device)

    def zeros(numel: int, dtype: torch.dtype) -> Tensor:
        pool = torch.cuda.MemPool(backend.mem_allocator)
        pools.append(pool)
        with torch.cuda.use_mem_pool(pool):
            t = torch.zeros(numel, dtype=dtype, device=device)
        backend.register_mem_pool(pool, symm=True)
        return t

    pools: list[torch.cuda.MemPool] = []
    zeros(1, torch.float32)
    return zeros
