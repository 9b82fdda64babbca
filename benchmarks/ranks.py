"""One process among several: it goes through the same rounds as the others, and a round takes as long as the slowest
rank's. The clock is told so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import measure
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepfast.comm

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
COMMAND = "torchrun --nproc-per-node {} --local-ranks-filter 0 -m pytest benchmarks/{}"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BUCKET = 25 << 20  # bytes: DDP's


class Ranks:
    """One rank's side of it."""

    def __init__(self, device: torch.device) -> None:
        self.comm, self.device = deepfast.comm.Communicator(), device
        self.token = torch.zeros(1)

    def check(self, right: bool, name: str, found: object = "") -> None:
        """Either all ranks go on, or none."""
        wrong = torch.tensor(float(not right))
        dist.all_reduce(wrong)
        assert not wrong, f"{name} has another result{found and f': {found}'}"

    def seconds(self, run: measure.Step, calls: int = 1) -> float:
        """Of one call, on the slowest rank; all start within a microsecond."""
        self.synchronize()
        dist.barrier()
        self.comm.all_reduce_(self.token)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        taken = torch.tensor((time.perf_counter() - start) / calls, dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(
        self, benchmark, run: measure.Step, moved: int, rounds: int, beside: measure.Yardstick, ready: measure.Step,
        calls: int = 1,
    ) -> None:  # fmt: skip
        """Times ``run``, which moves so many bytes on each rank, beside a yardstick of all ranks at once. ``ready`` is
        called before each round, and not timed."""

        def before() -> None:
            measure.tell(self.seconds(beside.run, calls))
            ready()

        def round_() -> None:
            measure.tell(self.seconds(run, calls))

        yardstick = measure.Yardstick(before, beside.moved, measure.told)
        measure.timed(benchmark, round_, yardstick, moved, rounds, calls_a_round=calls, ranks=RANKS)


def joined(kind: str, file: str) -> Iterator[Ranks]:
    """This process among those of ``kind``, cpu or cuda; without torchrun a skip that says how to start them."""
    if "WORLD_SIZE" not in os.environ:
        pytest.skip(f"needs ranks: {COMMAND.format(2, file)}")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        deepfast.comm.register_backend()
        dist.init_process_group("gloo")
    yield Ranks(device)
    dist.barrier()
    dist.destroy_process_group()


class Given(nn.Module):
    """Parameters whose gradients are there already: its backward pass costs nothing."""

    def __init__(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        super().__init__()
        self.parts, self.grads = nn.ParameterList(weights), grads

    def forward(self) -> Tensor:
        return _Gradients.apply(self.grads, *self.parts)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grads, *parts):
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad):
        return None, *(g.detach() for g in ctx.grads)  # what nobody else holds autograd takes as it is, without a copy
