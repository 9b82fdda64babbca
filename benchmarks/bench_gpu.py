"""On a GPU: each kernel's bandwidth against a copy's, the full fp16 step against torch's recipe, launches and waits.

make gpu        (with the tests; keeps the figures)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from conftest import report
from torch import nn
from torch.profiler import ProfilerActivity, profile

import deepfast
from deepfast import ops

pytestmark = pytest.mark.gpu
M = 1 << 20
ROUNDS = 20

# Bytes that one step moves per fp32 parameter: gradient, parameter and moments read, parameter and moments written.
STEPS = {
    "AdamW": (28, {}),
    "AdamW (amsgrad)": (36, {"amsgrad": True}),
    "SGD": (12, {}),
    "SGD (momentum)": (20, {"momentum": 0.9}),
    "Lion": (20, {}),
    "LAMB": (24 + 16, {}),  # two passes: moments moved on; parameter and moments read again, the parameter written
    "Adagrad": (20, {}),
}


def sizes(bytes_each: int) -> list[int]:
    """64M, 256M and 1B parameters, as far as the memory goes."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return [n for n in (64 * M, 256 * M, 1024 * M) if n * bytes_each < 0.9 * free]


def interleaved(cases: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds on the device, the cases taking turns. (What is touched is far larger than the L2.)"""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in cases.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_case(n: int) -> tuple[Callable[[], object], int]:
    """A device copy of about as many bytes as a step over n parameters moves, and its bytes."""
    source = torch.ones(2 * n, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 16 * n


def parameters(n: int, dtype: torch.dtype, tensors: int = 16) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(n // tensors, dtype=dtype, device="cuda")) for _ in range(tensors)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", STEPS)
def test_bandwidth_of_a_step(name, backend):
    moved, options = STEPS[name]
    for n in sizes(40):
        optimizer = getattr(deepfast, name.split()[0])(parameters(n, torch.float32), backend=backend, **options)
        copy, copied = copy_case(n)
        ms = interleaved({"step": optimizer.step, "copy": copy})
        rate, copy_rate = moved * n / ms["step"] / 1e6, copied / ms["copy"] / 1e6
        report({
            "title": f"{name}, fp32, {n // M}M parameters, {backend}",
            "ms": {k: round(v, 3) for k, v in ms.items()},
            "gb_per_s": round(rate, 1),
            "copy_gb_per_s": round(copy_rate, 1),
            "share_of_copy": round(rate / copy_rate, 3),
        })  # fmt: skip
        del optimizer, copy
        torch.cuda.empty_cache()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bandwidth_of_the_statistics(dtype, backend):
    found = ops.select(backend, torch.device("cuda", 0), dtype)
    for n in sizes(16):
        grads = [p.grad for p in parameters(n, dtype)]
        copy, copied = copy_case(n // 4)
        ms = interleaved({"statistics": lambda: found.statistics(grads), "copy": copy})  # noqa: B023
        rate, copy_rate = dtype.itemsize * n / ms["statistics"] / 1e6, copied / ms["copy"] / 1e6
        report({
            "title": f"statistics, {dtype}, {n // M}M gradients, {backend}",
            "ms": {k: round(v, 3) for k, v in ms.items()},
            "gb_per_s": round(rate, 1),
            "share_of_copy": round(rate / copy_rate, 3),
        })  # fmt: skip


def recipe(n: int) -> Callable[[], object]:
    """torch's parts with an fp32 master: upcast, unscale and check, clip, fused AdamW, copy back, zero."""
    params = parameters(n, torch.float16)
    masters = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = torch.optim.AdamW(masters, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
    scaler.scale(torch.ones((), device="cuda"))

    def run() -> None:
        for master, p in zip(masters, params, strict=True):
            master.grad = p.grad.float()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_copy_([p.detach() for p in params], [m.detach() for m in masters])
        torch._foreach_zero_([p.grad for p in params])

    return run


def ours(n: int, backend: str) -> Callable[[], object]:
    optimizer = deepfast.AdamW(parameters(n, torch.float16), max_grad_norm=1.0, reset_grad=True, backend=backend)
    scaler = deepfast.LossScaler("cuda", init_scale=128.0)

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return run


def test_the_full_half_precision_step():
    for n in sizes(90):
        copy, copied = copy_case(n)
        fp32 = torch.optim.AdamW(parameters(n, torch.float32), fused=True)
        cases = {backend: ours(n, backend) for backend in ("cuda", "triton")}
        ms = interleaved({**cases, "torch's parts": recipe(n), "torch fused, fp32 alone": fp32.step, "copy": copy})
        moved = 32 * n  # two reads of the gradient, its reset; master and moments both ways; the weight
        report({
            "title": f"full fp16 AdamW step, {n // M}M parameters",
            "ms": {k: round(v, 3) for k, v in ms.items()},
            "times_as_fast_as": {k: round(v / ms["cuda"], 2) for k, v in ms.items() if k != "copy"},
            "gb_per_s": round(moved / ms["cuda"] / 1e6, 1),
            "share_of_copy": round(moved / ms["cuda"] / (copied / ms["copy"]), 3),
        })  # fmt: skip
        del cases, fp32, copy
        torch.cuda.empty_cache()


def test_against_torch_fused():
    for n in sizes(56):
        mine = deepfast.AdamW(parameters(n, torch.float32), backend="cuda")
        theirs = torch.optim.AdamW(parameters(n, torch.float32), fused=True)
        ms = interleaved({"deepfast": mine.step, "torch fused": theirs.step})
        report({
            "title": f"AdamW, fp32, {n // M}M parameters, against torch fused",
            "ms": {k: round(v, 3) for k, v in ms.items()},
            "times_as_fast_as": round(ms["torch fused"] / ms["deepfast"], 2),
        })  # fmt: skip


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_launches_and_waits(backend):
    optimizer = deepfast.AdamW(parameters(M, torch.float16), max_grad_norm=1.0, reset_grad=True, backend=backend)
    scaler = deepfast.LossScaler("cuda", init_scale=128.0)
    for _ in range(3):
        scaler.step(optimizer)
        scaler.update()
    torch.cuda.synchronize()
    counted: dict[str, dict[str, int]] = {}
    for name, run in (("profiler", lambda: None), ("step", lambda: scaler.step(optimizer)), ("update", scaler.update)):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            run()
        names = [event.name for event in recorded.events()]
        counted[name] = {
            "launches": sum("LaunchKernel" in n for n in names),
            "waits": sum("Synchronize" in n for n in names),
            "copies": sum(n.startswith(("cudaMemcpy", "cudaMemset", "cuMemcpy", "cuMemset")) for n in names),
        }
    own = counted.pop("profiler")  # it waits at its end
    ours = {name: {kind: count - own[kind] for kind, count in counts.items()} for name, counts in counted.items()}
    report({"title": f"full fp16 AdamW step, launches and host waits, {backend}", **ours})


def test_small_tensors():
    """Host and device time of many small tensors, and a GPT-2's."""
    for count, numel in ((148, 840_000), (2000, 256), (10_000, 256)):
        cases = {}
        for name, cls, options in (
            ("deepfast", deepfast.AdamW, {"backend": "cuda"}),
            ("torch fused", torch.optim.AdamW, {"fused": True}),
        ):
            cases[name] = cls(parameters(count * numel, torch.float32, count), **options).step
        ms = interleaved(cases)
        report({
            "title": f"AdamW, {count} tensors of {numel}",
            "ms": {k: round(v, 3) for k, v in ms.items()},
            "times_as_fast_as": round(ms["torch fused"] / ms["deepfast"], 2),
        })  # fmt: skip
