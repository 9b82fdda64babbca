"""The optimizer step against torch's own, at sizes where memory decides."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, compare
from torch import nn

import deepfast
from deepfast import memory

CPU = torch.device("cpu")


def streaming(numel: int) -> Case:
    """What this machine's memory allows: an in-place multiply of memory like our state's."""
    data = memory.zeros(numel, torch.float32, CPU)
    return Case("in-place multiply", lambda: data.mul_(1.0), lambda: torch.zeros(1))


def parameter(numel: int, dtype: torch.dtype, huge: bool) -> nn.Parameter:
    data = memory.zeros(numel, dtype, CPU) if huge else torch.empty(numel, dtype=dtype)
    return nn.Parameter(data.copy_(torch.linspace(-1, 1, numel)))


@pytest.mark.parametrize("pages", ["huge pages", "ordinary pages"])
def test_fp32_adamw_64m(pages):
    """28 bytes a parameter: p, m and v read and written, g read."""
    n, huge = 64 << 20, pages == "huge pages"
    ours, theirs = parameter(n, torch.float32, huge), parameter(n, torch.float32, huge)
    ours.grad = theirs.grad = parameter(n, torch.float32, huge).detach()
    mine = deepfast.AdamW([ours], lr=1e-3)
    torchs = torch.optim.AdamW([theirs], lr=1e-3, fused=True)
    row = compare(
        f"AdamW, fp32, 64M parameters, parameters and gradients in {pages}",
        [
            Case("deepfast", mine.step, ours[:1000].detach),
            Case("torch fused", torchs.step, theirs[:1000].detach),
            streaming(n),
        ],
        bytes_moved=28 * n,
    )
    assert row["times_as_fast_as"]["torch fused"] is not None, "the results differ"


@pytest.mark.parametrize("pages", ["huge pages", "ordinary pages"])
def test_full_fp16_step_64m(pages):
    """Unscale, check, norm, clip, AdamW, master, fp16 weight: 30 bytes a parameter, against torch's parts."""
    n, huge = 64 << 20, pages == "huge pages"
    ours, theirs = parameter(n, torch.float16, huge), parameter(n, torch.float16, huge)
    gradient = parameter(n, torch.float16, huge).detach()
    ours.grad = gradient
    mine = deepfast.AdamW([ours], lr=1e-3, max_grad_norm=1.0)
    scaler = deepfast.LossScaler(init_scale=1024.0)

    def fused() -> None:
        scaler.step(mine)
        scaler.update()

    master = nn.Parameter(theirs.detach().float())
    torchs = torch.optim.AdamW([master], lr=1e-3, fused=True)

    def recipe() -> None:
        master.grad = gradient.float().mul_(1 / 1024)
        if master.grad.isfinite().all():
            nn.utils.clip_grad_norm_([master], 1.0)
            torchs.step()
            theirs.data.copy_(master.data)

    row = compare(
        f"full fp16 step, 64M parameters, parameters and gradients in {pages}",
        [
            Case("deepfast", fused, ours[:1000].detach().float),
            Case("torch's parts", recipe, theirs[:1000].detach().float),
            streaming(n),
        ],
        bytes_moved=30 * n,
        tolerance=1e-3,
        rounds=9,
    )
    assert row["times_as_fast_as"]["torch's parts"] is not None, "the results differ"


def test_2000_tensors_of_256():
    """One parallel region over all of them."""

    def make() -> list[nn.Parameter]:
        params = [nn.Parameter(torch.full((256,), 0.1 * (i % 7))) for i in range(2000)]
        for i, p in enumerate(params):
            p.grad = torch.full((256,), 0.01 * (i % 5))
        return params

    ours, theirs = make(), make()
    mine, torchs = deepfast.AdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, fused=True)
    compare(
        "AdamW, fp32, 2000 tensors of 256",
        [
            Case("deepfast", mine.step, lambda: torch.stack([p.detach() for p in ours])),
            Case("torch fused", torchs.step, lambda: torch.stack([p.detach() for p in theirs])),
        ],
        rounds=51,
    )
