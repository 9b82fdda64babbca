"""On a GPU: how long each kernel takes, beside a copy of as many bytes, torch's fused optimizers and torch's recipe.

    python benchmarks/bench_gpu.py cuda|triton [--probe]        (make gpu)

Times are the device's: before each call the device sleeps until the host has issued it, and one wait ends a round in
which all contenders had their turn. What the host needs is a figure of its own. Beside each share of the copy's speed
stands the one that was expected of an H100 (gpu_expected.json), from bytes and machine code, before any run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gpu_played
import torch
from gpu_stages import each, report
from torch import nn

import deepfast
from deepfast import ops, reference
from deepfast.optimizers import OPTIMIZERS

EXPECTED = json.loads(Path(__file__).with_name("gpu_expected.json").read_text())["share_of_copy"]
DEVICE = gpu_played.device()
M = 1 << (8 if gpu_played.PLAYED else 20)
ROUNDS = 1 if gpu_played.PLAYED else 15
CYCLES = 2e9  # a second, at most

# Adam's step is AdamW's.
STEPS = {
    "AdamW": {},
    **{name: {} for name in OPTIMIZERS if not name.startswith("Adam")},
    "SGD (momentum)": {"momentum": 0.9},
    "AdamW (amsgrad)": {"amsgrad": True},
}
FUSED = ("AdamW", "AdamW (amsgrad)", "SGD", "SGD (momentum)")  # of torch, for GPUs
Cases = Mapping[str, Callable[[], object]]


def timed(cases: Cases) -> dict[str, dict[str, object]]:
    """Each case's median milliseconds on the device, the second fastest and slowest, and the host's microseconds."""
    host: dict[str, list[float]] = {name: [] for name in cases}
    events: dict[str, list] = {name: [] for name in cases}
    asleep = {}
    for name, run in cases.items():
        for _ in range(3):
            start = time.perf_counter()
            run()
            asleep[name] = int(CYCLES * (2 * (time.perf_counter() - start) + 50e-6))
            torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for name, run in cases.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(asleep[name])
            begin.record()
            start = time.perf_counter()
            run()
            host[name].append(time.perf_counter() - start)
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    rows = {}
    for name, pairs in events.items():
        ms = sorted(begin.elapsed_time(end) for begin, end in pairs)
        spread = [round(ms[min(1, len(ms) - 1)], 4), round(ms[max(-2, -len(ms))], 4)]
        host_us = round(statistics.median(host[name]) * 1e6, 1)
        rows[name] = {"ms": round(statistics.median(ms), 4), "spread": spread, "host_us": host_us}
    return rows


def figure(title: str, cases: Cases, moved: int = 0) -> None:
    """One row. moved: bytes that the first case moves; it is then compared with a copy of as many."""
    if moved:
        source = torch.ones(moved // 8, device=DEVICE)  # half are read, half written
        target = torch.empty_like(source)
        cases = {**cases, "copy": lambda: target.copy_(source)}
    rows = timed(cases)
    ours = next(iter(cases))
    took = {name: float(row["ms"]) for name, row in rows.items()}
    more: dict[str, object] = {}
    if moved:
        more = {"tb_per_s": round(moved / took[ours] / 1e9, 3), "share_of_copy": round(took["copy"] / took[ours], 3),
                "expected": EXPECTED.get(title)}  # fmt: skip
    peers = {name: round(ms / took[ours], 2) for name, ms in took.items() if name not in (ours, "copy")}
    report({"title": title, **rows, **more, **({"times_as_fast_as": peers} if peers else {})})


def parameters(numel: int, dtype: torch.dtype, tensors: int = 16) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(numel // tensors, dtype=dtype, device=DEVICE)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params


def step(backend: str, name: str, numel: int, peer: bool) -> None:
    options = STEPS[name]
    made = getattr(deepfast, name.split(maxsplit=1)[0])(parameters(numel, torch.float32), backend=backend, **options)
    moved = reference.RULES[made._rule(made.param_groups[0])].moved
    cases: dict[str, Callable[[], object]] = {"step": made.step}
    if peer:
        theirs = getattr(torch.optim, name.split(maxsplit=1)[0])
        cases["torch fused"] = theirs(parameters(numel, torch.float32), fused=True, **options).step
    figure(f"{name}, fp32, {numel // M}M, {backend}", cases, moved * numel)


def gradient_statistics(backend: str, dtype: torch.dtype, numel: int) -> None:
    """As a step does it: what a launch needs is kept, and what follows for the step is found in it."""
    optimizer = deepfast.SGD(parameters(numel, dtype), backend=backend, max_grad_norm=1e9, master="none")
    optimizer.step()
    optimizer._gather()
    (launch,) = optimizer._launches
    record = torch.empty(3, device=DEVICE)
    run = functools.partial(launch.decide, record, None, None, 1e9, False)
    figure(f"statistics, {str(dtype)[6:]}, {numel // M}M, {backend}", {"statistics": run}, dtype.itemsize * numel)


# What a full step of 16-bit weights is asked beside, and the bytes it moves: gradients read twice and reset, weights,
# masters and moments read and written (a weight with an fp32 master is only written).
FORMS: dict[str, tuple[dict[str, str], float]] = {
    "": ({}, 30),
    ", fp32 master": ({"master": "fp32"}, 32),
    ", bf16 moments": ({"state_dtype": "bf16"}, 22),
    ", int8 moments": ({"state_dtype": "int8"}, 14 + 4 * 66 / 64),
    ", stochastic rounding": ({"master": "none", "rounding": "stochastic"}, 26),
}


def full_step(backend: str, numel: int, peer: bool, form: str = "") -> None:
    options, moved = FORMS[form]
    params = parameters(numel, torch.float16)
    optimizer = deepfast.AdamW(params, max_grad_norm=1.0, reset_grad=True, backend=backend, **options)
    scaler = deepfast.LossScaler(DEVICE, init_scale=128.0)

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    cases = {"full step": run, **({"torch's parts": recipe(numel)} if peer else {})}
    figure(f"full fp16 AdamW step{form}, {numel // M}M, {backend}", cases, int(moved * numel))


def narrow_moments(backend: str, numel: int) -> None:
    optimizer = deepfast.AdamW(parameters(numel, torch.float32), state_dtype="bf16", backend=backend)
    figure(f"AdamW, fp32, bf16 moments, {numel // M}M, {backend}", {"step": optimizer.step}, 20 * numel)


def recipe(numel: int) -> Callable[[], object]:
    """torch's parts with an fp32 master: upcast, unscale and check, clip, fused AdamW, copy back, zero."""
    params = parameters(numel, torch.float16)
    masters = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = torch.optim.AdamW(masters, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=128.0)
    scaler.scale(torch.ones((), device=DEVICE))

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


def accumulate(backend: str, numel: int) -> None:
    found = ops.select(backend, DEVICE, torch.float16)
    sums = [torch.zeros(numel // 16, device=DEVICE) for _ in range(16)]
    grads = [torch.ones(numel // 16, device=DEVICE, dtype=torch.float16) for _ in range(16)]
    run = functools.partial(found.accumulate_, sums, grads, 0.5, False)
    figure(f"accumulate fp16 into fp32, {numel // M}M, {backend}", {"accumulate": run}, 10 * numel)


def many_tensors(backend: str, count: int, numel: int, peer: bool) -> None:
    """Launches and the host's part decide; where everything fits the L2, so does that."""
    each_numel = max(1, numel * M >> 20)
    cases = {"deepfast": deepfast.AdamW(parameters(count * each_numel, torch.float32, count), backend=backend).step}
    if peer:
        theirs = parameters(count * each_numel, torch.float32, count)
        cases["torch fused"] = torch.optim.AdamW(theirs, fused=True).step
    figure(f"AdamW, {count} tensors of {numel}, {backend}", cases)


def cases_of(backend: str) -> dict[str, Callable[[], object]]:
    peer = backend == "cuda"
    free = torch.cuda.mem_get_info()[0]
    sizes = [n for n in (64 * M, 256 * M, 1024 * M) if n * 64 < free]  # AdamW, its peer, and a copy of what it moves
    cases: dict[str, Callable[[], object]] = {}
    for n in sizes:
        for name in STEPS if n < 1024 * M else ("AdamW", "LAMB"):
            cases[f"{name} {n}"] = functools.partial(step, backend, name, n, peer and name in FUSED)
        for dtype in (torch.float32, torch.float16):
            cases[f"statistics {dtype} {n}"] = functools.partial(gradient_statistics, backend, dtype, n)
        for form in FORMS if n == 256 * M else ("",):
            cases[f"full {n}{form}"] = functools.partial(full_step, backend, n, peer and n == 64 * M, form)
        cases[f"narrow {n}"] = functools.partial(narrow_moments, backend, n)
        cases[f"accumulate {n}"] = functools.partial(accumulate, backend, n)
    for count, numel in ((148, 840_000), (2000, 256), (10_000, 256)):
        few = count // 100 if gpu_played.PLAYED else count
        cases[f"{count} tensors"] = functools.partial(many_tensors, backend, few, numel, peer)
    return cases


def probe(backend: str) -> None:
    """Two steps of each kind, to be watched by a profiler."""
    full = {"max_grad_norm": 1.0, "reset_grad": True}
    runs = [
        deepfast.AdamW(parameters(64 * M, torch.float32), backend=backend),
        deepfast.LAMB(parameters(64 * M, torch.float32), backend=backend),
        deepfast.AdamW(parameters(64 * M, torch.float16), backend=backend, **full),
    ]
    for run in (*runs, *runs):
        run.step()
    torch.cuda.synchronize()


def tidied(case: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        try:
            case()
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cuda", "triton"])
    parser.add_argument("--probe", action="store_true", help="a few steps, untimed, for a profiler")
    chosen = parser.parse_args()
    if chosen.probe:
        raise SystemExit(probe(chosen.backend))
    raise SystemExit(each({name: tidied(case) for name, case in cases_of(chosen.backend).items()}))
