"""One contender's rounds: what it computes is checked before it has a time, and each round stands beside a yardstick's.

pytest-benchmark times the contenders one after the other, and machines drift: one streams at 70 GB/s now and at 130
some minutes later. So before each round the yardstick has its turn, a stream of fixed size, and what counts is the
share: how fast the round went through the bytes that its case has to move, as a part of the yardstick's speed beside
it. Ratios between contenders are ratios of shares.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from deepfast.optim import memory

CPU = torch.device("cpu")
BLOCK = 1 << 16  # elements
PATIENCE = 3.0  # seconds for the rounds of one contender; at least five are made
Step = Callable[[], object]


_told = 0.0


def told() -> float:
    """A clock that shows what it was told, for times that are not, or not only, this process's."""
    return _told


def tell(seconds: float) -> None:
    """It is later by so much."""
    global _told  # noqa: PLW0603
    _told += seconds


class Yardstick:
    """Calls ``run``, which moves so many bytes, and keeps how long each call took."""

    def __init__(self, run: Step, moved: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.run, self.moved, self.clock = run, moved, clock
        self.seconds: list[float] = []

    def __call__(self) -> None:
        start = self.clock()
        self.run()
        self.seconds.append(self.clock() - start)


@functools.cache
def streaming(numel: int) -> Yardstick:
    """What this machine's memory allows: an in-place multiply of memory like our state's."""
    data = memory.zeros(numel, torch.float32, CPU)
    return Yardstick(lambda: data.mul_(1.0), 8 * numel)


def timed(benchmark, run: Step, yardstick: Yardstick, moved: int, rounds: int, **facts: object) -> None:
    """Times ``run``, for which ``moved`` bytes have to be moved (0: the work has no such floor)."""
    yardstick.seconds.clear()
    benchmark.pedantic(run, setup=yardstick, rounds=rounds)
    if benchmark.enabled:
        benchmark.extra_info.update(facts)
        benchmark.extra_info.update(figures(benchmark.stats.stats.data, yardstick.seconds, moved, yardstick.moved))


def figures(seconds: Sequence[float], beside: Sequence[float], moved: int, beside_moved: int) -> dict[str, float]:
    """What is kept of the pairs. Without a floor the share is the yardstick's time over the round's."""
    part = (moved or beside_moved) / beside_moved
    shares = [part * b / s for s, b in zip(seconds, beside, strict=True)]
    low, share, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    middle = statistics.median(beside)
    return {
        "bytes": moved,
        "share": share,
        "share_spread": (high - low) / share,
        "yardstick_ms": middle * 1e3,
        "yardstick_gb_per_s": beside_moved / middle / 1e9,
    }


@dataclasses.dataclass(frozen=True)
class Contender:
    """Whoever takes part: ``make`` gives the step of these parameters, whose gradients are there.

    Args:
        tolerance: its own, for states of few bits; 0 is the case's.
        package: what brings it; where that is missing, or says that it does not run here, there is no figure.
    """

    make: Callable[[list[Tensor]], Step]
    tolerance: float = 0
    package: str = ""


def huge(numel: int, dtype: torch.dtype) -> Tensor:
    return memory.zeros(numel, dtype, CPU)


def ordinary(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One kind of step.

    Args:
        title: of the group.
        each: bytes an element that have to be moved, read and written.
        contenders: by name; the first is ours.
        oracle: the same step of fp64 parameters, one block of BLOCK elements; the second argument says how often the
            block is there.
        shapes: of the tensors; none: one tensor, of the size that was asked for.
        empty: gives parameters and gradients their memory.
        wrapped: makes a parameter or a gradient of the nth tensor.
        tolerance: of the updates, as a relative L2 error.
        rounds: at most.
        small: the yardstick has no more elements than this.
    """

    title: str
    each: int
    contenders: dict[str, Contender]
    oracle: Callable[[list[Tensor], int], Step]
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype = torch.float32
    empty: Callable[[int, torch.dtype], Tensor] = huge
    wrapped: Callable[[Tensor, int], Tensor] = lambda t, nth: t
    tolerance: float = 1e-4
    rounds: int = 15
    small: int = 0

    def group(self, elements: int) -> str:
        return self.title if self.shapes else f"{self.title}, {elements >> 20}M parameters"


# The same block again and again, in parameters and in gradients: what one block becomes all become, and norms over all
# of them are known from it. The second step's gradients are others than the first's: who forgets his state is found.
P, G1, G2 = range(3)


@functools.cache
def block(dtype: torch.dtype, which: int) -> Tensor:
    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(which), dtype=torch.float64)
    return (drawn * (0.1 if which == P else 1)).to(dtype)


def fill(tensors: Iterable[Tensor], which: int) -> None:
    """One after the other they hold the block again and again."""
    at = 0
    for t in tensors:
        flat, turned = t.view(-1), block(t.dtype, which).roll(-at)
        whole = flat.numel() // BLOCK * BLOCK
        flat[:whole].view(-1, BLOCK).copy_(turned)
        flat[whole:].copy_(turned[: flat.numel() - whole])
        at = (at + flat.numel()) % BLOCK


@functools.lru_cache(maxsize=2)
def expected(case: Case, repeats: int) -> list[Tensor]:
    """The block after no, one and two steps of the oracle."""
    p = nn.Parameter(block(case.dtype, P).double())
    step, after = case.oracle([p], repeats), [p.detach().clone()]
    for which in (G1, G2):
        p.grad = block(case.dtype, which).double()
        step()
        after.append(p.detach().to(case.dtype).double())
    return after


def error(params: Iterable[Tensor], before: Tensor, after: Tensor) -> float:
    """Relative L2 error of the update, over every element."""
    pieces = [getattr(p, "_local_tensor", p).detach().flatten() for p in params]
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # cat would copy gigabytes
    moves = (before - after).square()
    wrong = moved = 0.0
    for piece in result.split(BLOCK):
        wrong += (piece.double() - after[: len(piece)]).square().sum().item()
        moved += moves[: len(piece)].sum().item()
    return math.sqrt(wrong / moved)


def contest(benchmark, case: Case, name: str, elements: int) -> None:
    """The contender's two steps that are checked, and its rounds."""
    contender, shapes = case.contenders[name], case.shapes or ((elements,),)
    params, grads = begin(case, shapes)
    numel = sum(map(math.prod, shapes))
    before, once, twice = expected(case, numel // BLOCK)
    step = begun(contender, params)
    errors = [error(params, before, once)]
    fill(grads, G2)
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    errors.append(error(params, before, twice))
    tolerance = contender.tolerance or case.tolerance
    assert all(e <= tolerance for e in errors), f"{name} computes something else: its updates are off by {errors}"
    benchmark.group = case.group(elements)
    yardstick = streaming(min(case.small or elements, elements))
    rounds = min(case.rounds, max(5, int(PATIENCE / seconds)))
    timed(benchmark, step, yardstick, case.each * numel, rounds, error=max(errors))


def contest_once(benchmark, case: Case, name: str) -> None:
    """The contender's first step, of which there is one."""
    params, _ = begin(case, case.shapes)
    step = case.contenders[name].make(params)
    numel = sum(map(math.prod, case.shapes))
    benchmark.group = case.title
    timed(benchmark, step, streaming(BLOCK), 0, 1)
    before, once, _ = expected(case, max(1, numel // BLOCK))
    off = error(params, before, once)
    assert off <= case.tolerance, f"{name} computes something else: its updates are off by {off}"


def begin(case: Case, shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """The case's parameters, which have gradients, and the memory of those."""
    weights, grads = ([case.empty(math.prod(s), case.dtype).view(s) for s in shapes] for _ in range(2))
    fill(weights, P)
    fill(grads, G1)
    params: list[Tensor] = [nn.Parameter(case.wrapped(t, nth)) for nth, t in enumerate(weights)]
    for nth, (p, g) in enumerate(zip(params, grads, strict=True)):
        p.grad = case.wrapped(g, nth)
    return params, grads


def begun(contender: Contender, params: list[Tensor]) -> Step:
    """Its step, made once; of a package that is not there or does not run here, a skip with the reason."""
    try:
        step = contender.make(params)
        step()
    except (ImportError, NotImplementedError, RuntimeError) as problem:
        if not contender.package:
            raise
        absent(contender.package, problem)
    return step


def absent(package: str, problem: Exception) -> NoReturn:
    """A skip that says what a peer says: that it is not installed, or why it does not run here."""
    remedy = f" (pip install {package})" if isinstance(problem, ImportError) else ""
    pytest.skip(f"{package}: {str(problem).partition(chr(10))[0]}{remedy}")
