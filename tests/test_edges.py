"""What an optimizer is seldom given: infinite or overlapping parameters, very large ones, bad options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, difference, give_gradients, parameters
from torch import nn

import deepfast


def test_overlapping_parameters_are_refused():
    p = torch.zeros(1, 4).expand(3, 4).requires_grad_()
    p.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"share memory.*clone"):
        deepfast.AdamW([p]).step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_infinite_parameters_stay(backend, weight_decay):
    p = nn.Parameter(torch.tensor([1.0, -float("inf")]))
    p.grad = torch.tensor([1.0, 0.0])
    deepfast.AdamW([p], weight_decay=weight_decay, backend=backend).step()
    assert p[1] == -float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_process_wide_default_dtype_and_device_do_not_matter(dtype, backend):
    ours, theirs = parameters(), parameters()
    a, b = deepfast.AdamW(ours, max_grad_norm=1.0, backend=backend), deepfast.AdamW(theirs, max_grad_norm=1.0)
    give_gradients(ours, theirs)
    b.step()
    torch.set_default_dtype(dtype)
    try:
        scaler = deepfast.LossScaler(init_scale=1.0)
        with torch.device("meta"):
            scaler.step(a)
            scaler.update()
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(ours, theirs) < 1e-6


def available_gib() -> float:
    return int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()).group(1)) / 2**20


@pytest.mark.skipif(available_gib() < 11, reason="its two tensors take 9 GiB, and this machine has less than 11 free")
def test_more_elements_than_32_bits_can_count():
    n = (1 << 31) + 5000
    p = nn.Parameter(torch.ones(n, dtype=torch.float16))
    p.grad = torch.full((n,), 0.5, dtype=torch.float16)
    p.grad[-1], p.grad[0] = 2.0, 1.0
    optimizer = deepfast.SGD([p], lr=0.25, master="none", max_grad_norm=1e30, backend="cpu")
    optimizer.step()
    exact = ((n - 2) * 0.25 + 4.0 + 1.0) ** 0.5
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-6)
    assert p[0] == 0.75
    assert p[-1] == 0.5
    for start in range(1, n - 1, 1 << 28):
        assert (p[start : min(start + (1 << 28), n - 1)] == 0.875).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"lr": float("nan")}, "learning rate"),
        ({"betas": (1.0, 0.9)}, "index 0"),
        ({"betas": (0.9, -0.1)}, "index 1"),
        ({"betas": (0.9,)}, "there must be two"),
        ({"eps": -1e-9}, "epsilon"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"lr": torch.ones(2)}, "1-element"),
        ({"master": "fp8"}, "master='fp8' is not known"),
        ({"master": "split8"}, "master='split8' is not built"),
        ({"state_dtype": "fp8"}, "state_dtype='fp8' is not known"),
        ({"state_dtype": {"exp_avg": "fp8"}}, "state_dtype='fp8' is not known"),
        ({"state_dtype": {"exp_avg_square": "bf16"}}, "no moment 'exp_avg_square'.* exp_avg, exp_avg_sq"),
        ({"master": "none", "rounding": "up"}, "rounding='up' is not known"),
        ({"state_dtype": "int4"}, "state_dtype='int4' is not known: choose one of fp32, bf16, param, int8"),
        ({"rounding": "stochastic"}, "without a master: give master='none'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"differentiable": True}, "differentiable"),
        ({"params": [{"params": [], "master": "none"}]}, "an option of the optimizer"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        deepfast.AdamW(**{"params": parameters(), **options})


def test_a_forced_backend_that_is_missing_is_an_error(monkeypatch):
    params = parameters()
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="backend='cuda' was asked for, but the parameter lies on cpu"):
        deepfast.AdamW(params, backend="cuda").step()
    monkeypatch.setenv("DEEPFAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="backend='triton' was asked for, but the parameter lies on cpu"):
        deepfast.AdamW(params).step()
    assert all(map(torch.equal, params, before))
