"""What a step does with its gradients: clipped, scaled, skipped, reset; huge, sparse and lazy ones, too."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    BACKENDS,
    COUNTING,
    EVERY,
    NAMES,
    OURS,
    PEERS,
    TYPICAL,
    VARIANTS,
    decided,
    difference,
    give_gradients,
    parameters,
    peer_of,
)
from torch import nn

import deepfast
from deepfast.engine.sums import GradientSums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_are_refused(name, backend):
    layer = nn.Embedding(10, 3, sparse=True)
    optimizer = OURS[name](layer.parameters(), backend=backend)
    layer.weight.grad = torch.ones(10, 3)
    optimizer.step()  # also where a plan is there already
    layer.weight.grad = None
    layer(torch.tensor([1])).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*\(10, 3\).*sparse=False"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_clips_by_the_global_norm_inside_the_step(name, backend):
    ours, theirs = parameters(), parameters()
    mine, torchs = (
        c[name]([{"params": p[:3], "lr": 1e-2}, {"params": p[3:]}], **options, **TYPICAL[name])
        for c, p, options in ((OURS, ours, {"max_grad_norm": 0.5, "backend": backend}), (PEERS, theirs, {}))
    )
    for i, scale in enumerate((1.0, 1e-6, 3.0)):
        give_gradients(ours, theirs, seed=i, scale=scale)
        kept = [p.grad.clone() for p in ours]
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        mine.step(), torchs.step()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-5, atol=0)
        assert all(torch.equal(p.grad, k) for p, k in zip(ours, kept, strict=True))  # gradients are only read
    assert difference(ours, theirs) < 1e-6


def test_grad_norm_is_none_unless_asked_for():
    params = parameters()
    give_gradients(params)
    optimizer = deepfast.AdamW(params)
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("value", [1e30, 1e-30, 3e-45, 0.0])
def test_the_norm_neither_overflows_nor_vanishes(value):
    p = nn.Parameter(torch.zeros(5000))
    p.grad = torch.full((5000,), value)
    optimizer = deepfast.AdamW([p], max_grad_norm=1.0)
    optimizer.step()
    expected = (p.grad.double().square().sum()).sqrt().float()
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_without_a_scaler_non_finite_gradients_propagate(name, variant, backend):
    ours, theirs = parameters(), parameters()
    give_gradients(ours, theirs)
    ours[0].grad[3, 3] = theirs[0].grad[3, 3] = float("nan")
    if name not in ("Lion", "LAMB"):  # LAMB's own norm is infinite then, Lion's sign finite
        ours[1].grad[2] = theirs[1].grad[2] = float("inf")
    options = VARIANTS[name][variant]
    mine, peer = OURS[name](ours, backend=backend, **options), peer_of(name, theirs, **options)
    mine.step(), peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
        for key in mine.state.get(a, {}).keys() & peer.state.get(b, {}).keys():
            assert torch.equal(mine.state[a][key].isfinite(), peer.state[b][key].isfinite()), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("found", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("reset_grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_writes_nothing_but_the_reset(name, found, reset_grad, backend):
    """``found_inf`` is summed over devices and may be 2."""
    params = [*parameters(), *parameters(torch.float16, seed=1)]
    optimizer = OURS[name](params, reset_grad=reset_grad, backend=backend, **TYPICAL[name])
    give_gradients(params)
    optimizer.step()
    give_gradients(params, seed=1)
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(2.0)
    optimizer.step()
    for p, old in zip(params, before[0], strict=True):
        assert torch.equal(p, old)
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][index][k]) for k, v in values.items())
    assert all(bool(p.grad.any()) != reset_grad for p in params if p.numel())


@pytest.mark.parametrize("name", NAMES)
def test_reset_grad_zeroes_in_the_step(name):
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    a, b = OURS[name](ours, reset_grad=True, **TYPICAL[name]), OURS[name](theirs, **TYPICAL[name])
    give_gradients(ours, theirs)
    a.step(), b.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert not any(p.grad.any() for p in ours)


@pytest.mark.parametrize("name", NAMES)
def test_grad_scale_and_torchs_grad_scaler(name):
    for unscale_first in (False, True):
        ours, theirs = parameters(), parameters()
        mine, torchs = OURS[name](ours, lr=1e-2, **TYPICAL[name]), PEERS[name](theirs, lr=1e-2, **TYPICAL[name])
        scalers = [torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2) for _ in range(2)]
        for i in range(6):
            scale = scalers[0].get_scale()
            give_gradients(ours, theirs, seed=i, scale=scale)
            if i == 3:
                ours[0].grad[0, 0] = theirs[0].grad[0, 0] = float("inf")
            for optimizer, scaler in ((mine, scalers[0]), (torchs, scalers[1])):
                scaler.scale(torch.ones(()))
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        both = zip(ours, theirs, strict=True)
        assert all(((p - q) * decided(torchs, q)).abs().max() < 1e-6 for p, q in both if p.numel())
        if name in COUNTING:
            assert int(mine.state[ours[0]]["step"]) == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "LAMB"])
@pytest.mark.parametrize("gradient", [1e18, 1e19, 1e20, 1e22, 1e30, 3e38])
def test_one_huge_gradient_does_not_end_a_parameter(name, gradient, backend):
    """torch's second moment overflows to infinity, and the parameter never moves again."""
    p = nn.Parameter(torch.ones(20))
    optimizer = OURS[name]([p], lr=0.1, betas=(0.5, 0.5), weight_decay=0.0, backend=backend)
    for g in (gradient, *[-gradient] * 3, *[1.0] * 300):
        p.grad = torch.full((20,), g)
        before = p.detach().clone()
        optimizer.step()
        step = (before - p).abs().max() / (before.norm() if name == "LAMB" else 1)
        assert step <= 0.15, "no step is longer than Adam's are"
    assert (before != p).all(), "it follows small gradients again"
    if name != "LAMB":
        assert (before - p > 0.05).all()


def test_reset_grad_refuses_what_it_cannot_do_before_anything_is_written():
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    q.grad = torch.ones(1, 3).expand(4, 3)
    with pytest.raises(RuntimeError, match=r"a gradient.*share memory"):
        deepfast.AdamW([p, q], reset_grad=True).step()
    q.grad = p.grad
    with pytest.raises(RuntimeError, match="share one gradient tensor"):
        deepfast.AdamW([p, q], reset_grad=True).step()
    assert (p == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_views_as_gradients(backend):
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.complex(torch.ones(5), torch.full((5,), 2.0)).conj().imag
    assert p.grad.is_neg()
    deepfast.AdamW([p], lr=0.1, weight_decay=0.0, reset_grad=True, backend=backend).step()
    torch.testing.assert_close(p.detach(), torch.full((5,), 1.1))
    assert (p.grad == 0).all()
    z = nn.Parameter(torch.ones(5, dtype=torch.complex64))
    z.grad = torch.full((5,), 1 + 1j, dtype=torch.complex64).conj()
    deepfast.AdamW([z], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(z.detach(), torch.full((5,), 0.9 + 0.1j))


@pytest.mark.parametrize(("dtype", "taken"), [(None, 1.0), (torch.float32, 1.001)])
def test_sums_take_gradients_of_the_weights_type(dtype, taken):
    """As in a first step. (A parameter that has taken a sum of fp32 is given any.) Who asks for fp32 gets it."""
    p = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    p.grad_dtype = dtype
    p.grad = torch.tensor(1.001)
    sums = GradientSums([p])
    sums.begin(None, last=True)
    sums.add()
    assert float(sums.sums[0]) == pytest.approx(taken, rel=1e-7)
