"""What a step leaves of the gradients: as torch's optimizers under torch's GradScaler, and after reset_grad."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, NAMES, OURS, TYPICAL
from torch import nn

import deepfast

SCALE = 1024.0


def parameters(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in [(33, 7), (), (5,), (0,)]]
    params[0].data = params[0].data.t()
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(dtype) / 64
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("maximize", [False, True])
def test_they_are_unscaled_as_torchs_gradscaler_users_expect(name, maximize, dtype, backend):
    """The weights are those of a step on gradients that were never scaled; their sign stays in a step that ascends."""
    here, there = parameters(dtype), parameters(dtype)
    options = {**TYPICAL[name], "maximize": maximize, "backend": backend}
    a, b = OURS[name](here, **options), OURS[name](there, **options)
    wanted = [p.grad.clone() for p in here]
    for p in here:
        p.grad.mul_(SCALE)
    a.grad_scale, a.found_inf = torch.tensor(SCALE), torch.tensor(0.0)
    a.step()
    b.step()
    for p, q, g in zip(here, there, wanted, strict=True):
        assert torch.equal(p.grad, g)
        assert torch.equal(p, q)
    if a.state[here[0]].get("master") is not None:
        assert torch.equal(a.state[here[0]]["master"], b.state[there[0]]["master"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_what_the_step_took_where_it_clips(backend):
    here = parameters(torch.float32)
    wanted = [p.grad.clone() for p in here]
    for p in here:
        p.grad.mul_(SCALE)
    optimizer = deepfast.SGD(here, max_grad_norm=0.01, backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(0.0)
    optimizer.step()
    wanted_params = [nn.Parameter(torch.zeros_like(g)) for g in wanted]
    for p, g in zip(wanted_params, wanted, strict=True):
        p.grad = g
    nn.utils.clip_grad_norm_(wanted_params, 0.01)
    for p, q in zip(here, wanted_params, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_leaves_them(backend):
    (p, *_) = parameters(torch.float16)
    before = p.grad.clone()
    optimizer = deepfast.AdamW([p], backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p.grad, before)


def test_through_gradscaler_itself():
    """fused=True: torch's own leaves the same."""
    kept = []
    for cls in (deepfast.AdamW, torch.optim.AdamW):
        p = nn.Parameter(torch.arange(6.0))
        optimizer, scaler = cls([p], fused=True), torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale((p * p).sum()).backward()
        scaler.step(optimizer)
        kept.append(p.grad)
    assert torch.equal(*kept)
    assert kept[0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_lossscaler_does_not_write_them():
    p = nn.Parameter(torch.ones(3))
    optimizer, scaler = deepfast.SGD([p]), deepfast.LossScaler("cpu", init_scale=SCALE)
    scaler.scale(p.sum()).backward()
    version = p.grad._version
    scaler.step(optimizer)
    assert p.grad.tolist() == [SCALE] * 3
    assert p.grad._version == version


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_gradient_lets_go_of_its_graph(backend):
    """create_graph=True: else the graph would grow at each step."""
    p = nn.Parameter(torch.ones(3))
    optimizer = deepfast.SGD([p], lr=0.01, reset_grad=True, backend=backend)
    for _ in range(4):
        (p * p * p).sum().backward(create_graph=True)
        assert p.grad.requires_grad
        optimizer.step()
        assert p.grad.grad_fn is None
        assert not p.grad.requires_grad
        assert not p.grad.any()
