"""Every optimizer and type on a GPU against the CPU's bits, one overflow among the steps; and a graph. (make gpu)

Each case says what it has found at once: where a tensor differs first, and in how many elements.
"""

from __future__ import annotations

import functools
import itertools
import os

import gpu_played
import torch
from cases import NAMES, OURS, TYPICAL
from gpu_stages import each
from torch import Tensor, nn

import deepfast

DEVICE = gpu_played.device()
LONG = 1 << (14 if gpu_played.PLAYED else 20)
SHAPES = [(64, 33), (5,), (), (0, 3), (3000, 7), (1, 4097), (LONG,)]


def difference(what: str, a: Tensor, b: Tensor) -> list[str]:
    a, b = a.detach().reshape(-1), b.detach().reshape(-1).cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return [f"{what}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"]
    differ = (a != b) & ~(a.isnan() & b.isnan())
    if not differ.any():
        return []
    at = int(differ.nonzero()[0])
    return [f"{what}: {int(differ.sum())} of {a.numel()} differ, from {at} on: {a[at].item()!r} and {b[at].item()!r}"]


def bits(name: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]
    here, there = ([nn.Parameter(v.to(d, copy=True)) for v in values] for d in (torch.device("cpu"), DEVICE))
    options = {**TYPICAL[name], "max_grad_norm": 1.0, "reset_grad": True}
    cpu, gpu = OURS[name](here, backend="cpu", **options), OURS[name](there, backend="cuda", **options)
    scalers = [deepfast.LossScaler(d, init_scale=8.0, growth_interval=2) for d in ("cpu", DEVICE)]
    wrong: list[str] = []
    for step in range(3):
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            q.grad = p.grad.to(DEVICE, copy=True)
        if step == 1:
            here[0].grad[0, 3] = there[0].grad[0, 3] = torch.inf
        for optimizer, scaler in zip((cpu, gpu), scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
        wrong += difference(f"step {step}, norm", cpu.grad_norm, gpu.grad_norm)
    for p, q in zip(here, there, strict=True):
        what = f"of {tuple(p.shape)}"
        wrong += difference(f"parameter {what}", p, q) + difference(f"gradient {what}", p.grad, q.grad)
        for key, value in cpu.state[p].items():
            wrong += difference(f"{key} {what}", value, gpu.state[q][key])
    if scalers[0].state_dict() != scalers[1].state_dict():
        wrong.append(f"scaler: {scalers[0].state_dict()} and {scalers[1].state_dict()}")
    print(f"{name}, {dtype}: {'; '.join(wrong) or 'the same bits'}", flush=True)
    if wrong:
        raise RuntimeError("other bits than on the CPU")


def graph() -> None:
    """Captured once, replayed: the learning rate is read and the steps are counted on the device."""
    p = nn.Parameter(torch.ones(100_000, device=DEVICE))
    p.grad = torch.ones_like(p)
    lr = torch.tensor(0.5, device=DEVICE)
    optimizer = deepfast.SGD([p], lr=lr, backend="cuda", momentum=0.5)
    optimizer.step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        optimizer.step()
    for rate in (0.25, 0.125):
        lr.fill_(rate)
        captured.replay()
    want = 1 - 0.5 - 0.25 * 1.5 - 0.125 * 1.75
    got = p.unique().tolist(), optimizer.state[p]["step"].item()
    print(f"graph: {got}", flush=True)
    if got != ([want], 3.0):
        raise RuntimeError(f"not {want} after 3 steps")


CASES = {
    **{f"{n} {d}": functools.partial(bits, n, d) for n, d in
       itertools.product(NAMES, (torch.float32, torch.float16, torch.bfloat16))},
    **({} if gpu_played.PLAYED else {"graph": graph}),
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(min(8, os.cpu_count() or 1))
    raise SystemExit(each(CASES))
