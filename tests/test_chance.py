"""Rounding by chance: right on average, a function of where and when, the same everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BACKENDS, HALVES, NAMES, OURS, TYPICAL, give_gradients, parameters
from torch import nn

import deepfast
from deepfast import reference
from deepfast.reference.noise import noise

MEANS = (1.001, -0.3337, 3e-6, 7e-8, 60000.5, -6.1e-5)


def moved_to(value, dtype, backend, numel=1 << 18, seed=0):
    """Zeros, from which a step goes to ``value``."""
    p = nn.Parameter(torch.zeros(numel, dtype=dtype))
    p.grad_dtype = None
    p.grad = torch.full((numel,), -value)
    optimizer = deepfast.SGD([p], lr=1.0, master="none", rounding="stochastic", seed=seed, backend=backend)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_it_is_right_on_average_and_never_off_by_more_than_a_unit(dtype, backend):
    for value in MEANS:
        exact = torch.tensor(value)
        found = moved_to(value, dtype, backend)[0].detach().double()
        steps = found.unique()
        assert len(steps) == 2, "the neighbours of the value"
        assert steps[0] < exact < steps[1]
        share = (exact.double() - steps[0]) / (steps[1] - steps[0])
        error = (found == steps[1]).double().mean() - share
        assert error.abs() < 5 * (share * (1 - share) / len(found)).sqrt() + 2.0**-16, value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_exact_stays_and_what_is_too_large_saturates(dtype, backend):
    largest = torch.finfo(dtype).max
    huge = largest if dtype == torch.float16 else None
    for value, expected in ((1.5, 1.5), (0.0, 0.0), (largest, largest), (3.3e38, huge), (torch.inf, torch.inf)):
        p, _ = moved_to(value, dtype, backend, numel=5000)
        if expected is not None:
            assert (p == expected).all(), value
        else:
            assert p.isfinite().all()
    p, _ = moved_to(torch.nan, dtype, backend, numel=5000)
    assert p.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_whoever_steps(name, dtype, backend):
    options = {"lr": 1e-2, "master": "none", "rounding": "stochastic", **TYPICAL[name]}
    shapes = [(70, 33), (5,), (), (0, 3), (4097,)]
    runs = []
    for which in (backend, "reference"):
        params = parameters(dtype, shapes)
        params[0] = nn.Parameter(params[0].detach().t())
        optimizer = OURS[name](params, backend=which, **options)
        for i in range(3):
            give_gradients(params, seed=i)
            optimizer.step()
            if i == 0:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(optimizer.state[p]["step"] == 3 for p in params)
        runs.append(params)
    # The values that are rounded differ now and then by a rounding of fp32's, and turn another way by that.
    differ = sum(int((p != q).sum()) for p, q in zip(*runs, strict=True))
    assert differ <= 0.002 * sum(p.numel() for p in runs[0])


def test_seed_parameter_step_and_place_make_other_bits():
    p, optimizer = moved_to(0.3337, torch.bfloat16, "auto")
    again, _ = moved_to(0.3337, torch.bfloat16, "auto")
    assert torch.equal(p, again)
    other, _ = moved_to(0.3337, torch.bfloat16, "auto", seed=1)
    up, others = (p != p.min()).double(), (other != other.min()).double()
    assert torch.corrcoef(torch.stack([up.flatten(), others.flatten()]))[0, 1].abs() < 0.01
    with torch.no_grad():
        p.zero_()
    optimizer.step()
    later = (p != p.min()).double()
    assert torch.corrcoef(torch.stack([up.flatten(), later.flatten()]))[0, 1].abs() < 0.01
    for apart in (1, 2, 16, 1024, 4096):
        assert torch.corrcoef(torch.stack([up[apart:], up[:-apart]]))[0, 1].abs() < 0.01, apart
    second = nn.Parameter(torch.zeros_like(p))
    for q in (p, second):
        q.grad_dtype = None
        q.grad = torch.full((q.numel(),), -0.3337)
        q.data.zero_()
    deepfast.SGD([p, second], lr=1.0, master="none", rounding="stochastic").step()
    assert (p != second).double().mean() > 0.2


def test_noise_is_spread_evenly():
    bits = noise(7, torch.tensor(3.0), 0, torch.empty(1 << 20))
    assert bits.min() >= 0
    assert bits.max() < 1 << 32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(bits >> shift & 255, minlength=256).double()
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 150 < chi2 < 380, shift  # 255 degrees of freedom: five deviations
    part = noise(7, torch.tensor(3.0), 1000, torch.empty(50, 40).t())
    assert torch.equal(part.t().reshape(-1), bits[1000:3000]), "as they lie in memory"


def test_a_skipped_step_leaves_all_as_it_is():
    p, optimizer = moved_to(0.3337, torch.bfloat16, "auto", numel=5000)
    before = p.detach().clone()
    p.grad[7] = torch.inf
    scaler = deepfast.LossScaler(init_scale=2.0)
    scaler.step(optimizer)
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


def test_updates_below_half_a_unit_are_not_lost():
    p = nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
    optimizer = deepfast.SGD([p], lr=2.0**-12, master="none", rounding="stochastic")
    for _ in range(256):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p.double().mean() - (1 - 2.0**-4)).abs() < 1e-3
    assert reference.RULES["sgd"].counts_steps is False


def test_a_configurations_seed_is_that_of_chance():
    ends = {}
    for seed in (None, 0, 3):
        net = torch.nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            net.weight.copy_(torch.linspace(-1, 1, 64).view(8, 8))
        params = {"lr": 0.01, "state_dtype": "int8"} | ({} if seed is None else {"seed": seed})
        config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": params}}
        engine, optimizer, *_ = deepfast.initialize(model=net, config=config)
        assert optimizer.seed == (seed or 0)
        for _ in range(3):
            engine.backward(engine(torch.linspace(0, 1, 8)).square().mean())
            engine.step()
        ends[seed] = net.weight.detach().clone()
    assert torch.equal(ends[None], ends[0])
    assert not torch.equal(ends[0], ends[3])
