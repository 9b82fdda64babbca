"""All-reduce between two ranks of this machine: ours, gloo's and DeepSpeed's through shared memory; or, where there are
several GPUs, between those: ours and NCCL's, from ordinary and from its symmetric memory.

The ranks are started once. A figure is the median over rounds in which the contenders take turns, each round counting
as long as its slower rank takes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import report
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import deepfast.comm

OURS, ORDINARY, GLOO, DEEPSPEED = "deepfast", "deepfast, ordinary memory", "gloo", "DeepSpeed's shared memory"
NCCL, NCCL_SYMMETRIC = "NCCL", "NCCL, symmetric memory"
RANKS = int(os.environ.get("WORLD_SIZE", "2"))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BUCKET = 25 << 20  # DDP's
# bytes: calls a sample, samples
WARM = {1 << 10: (200, 31), 4 << 10: (200, 31), 64 << 10: (100, 31), 1 << 20: (20, 31), 4 << 20: (8, 21),
        BUCKET: (4, 21), 256 << 20: (1, 9)}  # fmt: skip


def measured(place: Path, ranks: int, device: str) -> list[dict]:
    env = {"TORCH_EXTENSIONS_DIR": str(place), **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["PATH"] = sysconfig.get_path("scripts") + os.pathsep + env["PATH"]  # ninja, for DeepSpeed
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([*launch, __file__, str(place / "rows.json"), device], check=True, env=env)
    return json.loads((place / "rows.json").read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    return measured(tmp_path_factory.mktemp("comm"), RANKS, "cpu")


@pytest.mark.parametrize("part", ["all-reduce", "DDP"])
def test_comm(rows, part):
    for row in rows:
        if row["title"].startswith(part):
            report(row)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_several_gpus(tmp_path, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    for row in measured(tmp_path, ranks, "cuda"):
        report(row)


class Ranks:
    """One rank's side of it."""

    def __init__(self, device: torch.device) -> None:
        self.comm, self.device = deepfast.comm.Communicator(), device
        self.token = torch.zeros(1)
        self.rows: list[dict] = []
        self.absent = ""
        self.contenders: dict[str, Callable[[Tensor], object]] = {
            OURS: self.comm.all_reduce_,
            ORDINARY: self.comm.all_reduce_,
            NCCL if device.type == "cuda" else GLOO: dist.all_reduce,
        }
        try:
            if device.type == "cuda":
                self.symmetric = symmetric_memory(device)
                self.contenders[NCCL_SYMMETRIC] = dist.all_reduce
            else:
                self.contenders[DEEPSPEED] = deepspeeds(self.comm.rank)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            self.absent = f"not there: {str(error).partition(chr(10))[0]}"

    def memory(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        if name == OURS:
            return self.comm.empty(numel, dtype, self.device).zero_()
        if name == NCCL_SYMMETRIC:
            return self.symmetric(numel, dtype)
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def compare(self, title: str, runs: dict[str, Callable[[], object]], calls: int, rounds: int) -> None:
        """Reports the time of one call of each, as :func:`conftest.compare` does."""
        times = torch.zeros(rounds, len(runs), dtype=torch.float64)
        order = list(enumerate(runs.values()))
        for turn in range(rounds):
            for index, run in order if turn % 2 else order[::-1]:
                for _ in range(calls):  # its memory is in the caches again, as far as they hold it
                    run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                dist.barrier()
                self.comm.all_reduce_(self.token)  # all ranks start within a microsecond
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times[turn, index] = (time.perf_counter() - start) / calls
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        medians = {name: statistics.median(times[:, index].tolist()) for index, name in enumerate(runs)}
        row = {"title": title, "ms": {name: round(value * 1e3, 5) for name, value in medians.items()}}
        for ours, key in ((OURS, "times_as_fast_as"), (ORDINARY, "from_ordinary_memory_times_as_fast_as")):
            if ours in medians:
                peers = {name: value for name, value in medians.items() if not name.startswith(OURS)}
                row[key] = {name: round(value / medians[ours], 2) for name, value in peers.items()}
        if self.absent:
            row["not_compared"] = self.absent
        self.rows.append(row)

    def all_reduce(self, title: str, dtype: torch.dtype, bytes_each: int, count: int, calls: int, rounds: int) -> None:
        """Over ``count`` tensors in turn; zeros, whose sum may be taken again and again."""
        numel = bytes_each // dtype.itemsize
        tensors = {name: [self.memory(name, numel, dtype) for _ in range(count)] for name in self.contenders}
        parts = [torch.arange(numel, dtype=torch.int32).add_(r).remainder_(17).to(dtype) for r in range(RANKS)]
        for name, reduce in self.contenders.items():
            t = tensors[name][0].copy_(parts[self.comm.rank])
            reduce(t)
            assert torch.equal(t.cpu(), sum(parts[1:], parts[0])), f"{name} has another result"
            t.zero_()
        del parts

        def run(name: str) -> Callable[[], object]:
            reduce = self.contenders[name]
            if count == 1:
                (t,) = tensors[name]
                return lambda: reduce(t)
            turns = itertools.cycle(tensors[name])
            return lambda: reduce(next(turns))

        self.compare(title, {name: run(name) for name in self.contenders}, calls, rounds)

    def ddp(self) -> None:
        """One bucket, from gradients that cost nothing: the hook alone, and the backward pass around it."""
        buckets: list[dist.GradBucket] = []

        def keep(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            buckets.append(bucket)
            return deepfast.comm.allreduce_hook(self.comm, bucket)

        def made(
            group: dist.ProcessGroup | None = None, state: object = None, hook: Callable | None = None
        ) -> nn.Module:
            model = nn.parallel.DistributedDataParallel(Given(), process_group=group, bucket_cap_mb=100)
            if hook:
                model.register_comm_hook(state, hook)
            for _ in range(3):  # DDP arranges its buckets after the first
                model.zero_grad()
                model().backward()
            assert all((p.grad == (RANKS - 1) / 2).all() for p in model.parameters()), "not the mean over ranks"
            return model

        keep.__annotations__ = {}  # as text DDP does not know them
        made(hook=keep)
        bucket = buckets[-1]
        assert bucket.is_last()
        assert bucket.buffer().nbytes == BUCKET
        self.compare(
            "DDP, the hook alone, one bucket of 25 MiB in ordinary memory",
            {
                ORDINARY: lambda: deepfast.comm.allreduce_hook(self.comm, bucket).wait(),
                GLOO: lambda: default_hooks.allreduce_hook(None, bucket).wait(),
            },
            *WARM[BUCKET],
        )
        models = {
            OURS: made(dist.new_group(backend="deepfast")),  # buckets in our memory
            ORDINARY: made(None, self.comm, deepfast.comm.allreduce_hook),
            GLOO: made(),
        }
        runs = {name: lambda model=model: model().backward() for name, model in models.items()}
        self.compare("DDP, the backward pass, one bucket of 25 MiB", runs, *WARM[BUCKET])


class Given(nn.Module):
    """25 MiB of parameters whose gradients are there already: each rank's number."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(BUCKET // 4 // 5) for _ in range(5))
        self.grads = tuple(torch.full_like(p, dist.get_rank()) for p in self.parts)

    def forward(self) -> Tensor:
        return Gradients.apply(self.grads, *self.parts)


class Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grads, *parts):
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad):
        return None, *ctx.grads


def deepspeeds(rank: int) -> Callable[[Tensor], object]:
    """DeepSpeed's all-reduce of CPU tensors, where it takes the way through shared memory."""
    os.environ["LOCAL_SIZE"] = str(RANKS)  # else it crashes at the first call
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


def main() -> None:
    torch.set_num_threads(1)
    kind = sys.argv[2]
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        deepfast.comm.register_backend()
        dist.init_process_group("gloo")
    ranks = Ranks(device)
    which = f"{RANKS} GPUs, all-reduce" if kind == "cuda" else "all-reduce"
    for name, dtype in DTYPES.items():
        for size, (calls, rounds) in WARM.items():
            text = f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
            ranks.all_reduce(f"{which}, {name}, {text}, warm", dtype, size, 1, calls, rounds)
        ranks.all_reduce(f"{which}, {name}, 25 MiB, rotating over 512 MiB of buckets", dtype, BUCKET, 21, 21, 9)
    if kind == "cpu":
        ranks.ddp()
    if ranks.comm.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(ranks.rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
