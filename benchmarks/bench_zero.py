"""A training step on several ranks of one host, whose optimizer's state and gradients' sums are sharded (ZeRO stages 1
and 2) or whole on each (0): how long it takes from gradients to weights, and how much memory it needs.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest benchmarks/bench_zero.py

A round takes as long as its slowest rank. The yardstick is an in-place multiply on all ranks at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator

import footprint
import measure
import pytest
import torch
from measure import BLOCK, G1, G2, P
from peers import DECAY, EPS, LR, NORM, NORMS
from ranks import DTYPES, RANKS, Given, Ranks
from sharded import TRAINERS, Training, scale
from torch import Tensor, nn

TENSORS = 16  # 2048 x 2048 each
PATIENCE, LEAST, MOST = 5.0, 5, 15  # seconds for the rounds of one contender, and their number


def floor(dtype: torch.dtype, stage: int, ranks: int = RANKS) -> float:
    """Bytes a parameter that each rank has to move: all gradients are read, their sums written once; who steps reads
    the sum, and reads and writes master and moments; every rank's weights are written."""
    itemsize = dtype.itemsize
    summed = itemsize + 4 / ranks
    stepped = 4 + (4 if dtype == torch.float32 else 8) + 16  # an fp32 weight is its own master, and written below
    return summed + (stepped / ranks if stage else stepped) + itemsize


@functools.cache
def expected(dtype: torch.dtype, repeats: int) -> list[Tensor]:
    """The block of weights after no, one and two steps in fp64 from the mean of the ranks' gradients."""
    p = nn.Parameter(measure.block(dtype, P).double())
    optimizer, after = torch.optim.AdamW([p], lr=LR, weight_decay=DECAY, eps=EPS, foreach=False), [p.detach().clone()]
    for which in (G1, G2):
        drawn = [measure.block(dtype, which_of(rank, which)).double() for rank in range(RANKS)]
        grad = sum(drawn) / RANKS / scale(dtype)
        p.grad = grad * min(1.0, NORM / (grad.norm().item() * repeats**0.5))
        optimizer.step()
        after.append(p.detach().to(dtype).double())
    return after


def which_of(rank: int, which: int) -> int:
    """Each rank has gradients of its own: who leaves one out is found."""
    return which + 2 * rank


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """A skip where the peer is not there, or says that it does not run here."""
    package = TRAINERS[name].package
    try:
        yield
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as problem:
        if package == "deepfast":
            raise
        measure.absent(package, problem)


Turn = tuple[Callable[[], object], Callable[[], object]]  # what comes before a round, and the round


def from_gradients(training: Training, module: Given) -> Turn:
    def run() -> None:
        training.reduce(module.grads)
        training.step()

    return lambda: None, run


def from_backward(training: Training, module: Given) -> Turn:
    losses: list[Tensor] = []

    def run() -> None:
        training.backward(losses.pop())
        training.step()

    return lambda: losses.append(training.forward()), run


def contest(benchmark, ranks: Ranks, name: str, dtype: torch.dtype, elements: int, turn: Callable[..., Turn]) -> None:
    """The contender's two steps that are checked, and its rounds."""
    gc.collect()  # the cycles of engines before hold gigabytes
    weights, flat = (measure.huge(elements, dtype) for _ in range(2))
    shape = (TENSORS, -1, min(2048, elements // TENSORS))
    measure.fill([weights], P)
    module = Given(list(weights.view(shape)), list(flat.view(shape)))
    before, *after = expected(dtype, elements // BLOCK)
    trainer = TRAINERS[name]
    with running(name):
        trainer.load()
        prepare, run = turn(trainer.make(module, dtype), module)

    def ready(which: int = G1) -> None:  # some write into the gradients
        measure.fill([flat], which_of(ranks.comm.rank, which))
        prepare()

    for which, right in zip((G1, G2), after, strict=True):
        ready(which)
        seconds = ranks.seconds(run)
        error = measure.error(module.parameters(), before, right)
        ranks.check(error <= tolerance(trainer.package, dtype), name, f"its updates are off by {error:.2g}")
    rounds = min(MOST, max(LEAST, int(PATIENCE / seconds)))
    moved = int(elements * floor(dtype, trainer.stage))
    ranks.timed(benchmark, run, moved, rounds, measure.streaming(elements), ready)


def tolerance(package: str, dtype: torch.dtype) -> float:
    if package != "deepfast":
        return NORMS  # its norm is of fp32, and gloo rounds 16-bit sums
    return 1e-4 if dtype == torch.float32 else 0.002  # roundings turn


@pytest.mark.parametrize("contender", [name for name in TRAINERS if not name.startswith("deepspeed")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(timer=measure.told)
def test_step(benchmark, ranks, elements, dtype, contender):
    """From gradients that are there already; DeepSpeed's engine has no such beginning."""
    benchmark.group = f"step, {dtype}, {elements >> 20}M parameters"
    contest(benchmark, ranks, contender, DTYPES[dtype], elements, from_gradients)


@pytest.mark.parametrize("contender", TRAINERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(timer=measure.told)
def test_backward(benchmark, ranks, elements, dtype, contender):
    """``backward`` and ``step``, as scripts call them, from gradients that cost nothing."""
    benchmark.group = f"backward and step, {dtype}, {elements >> 20}M parameters"
    contest(benchmark, ranks, contender, DTYPES[dtype], elements, from_backward)


@pytest.mark.parametrize("contender", TRAINERS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.benchmark(timer=measure.told)
def test_memory(benchmark, ranks, request, dtype, contender):
    """Of one step of GPT-2 124M, a short sequence on each rank."""
    pytest.importorskip("transformers")
    tokens = request.config.getoption("--tokens")
    with running(contender):
        found = footprint.of_training(contender, dtype, tokens)
    benchmark.group = f"peak memory, {dtype}, GPT-2 124M"
    benchmark.pedantic(lambda: measure.tell(found.pop("seconds")))
    benchmark.extra_info.update(found, ranks=RANKS, tokens=tokens)
