"""fp32 masters of 16-bit weights: made, loaded, rounded, and written past from outside."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, NAMES, OURS, TYPICAL, give_gradients, parameters, trained
from torch import nn

import deepfast
from deepfast import reference


def test_a_missing_master_is_taken_from_the_parameter():
    ours = parameters(torch.bfloat16)
    state = trained(torch.optim.AdamW, parameters(torch.bfloat16)).state_dict()
    optimizer = deepfast.AdamW(ours)
    optimizer.load_state_dict(state)
    assert all(torch.equal(optimizer.get_master(p), p.float()) for p in ours)


def test_refresh_master_takes_over_parameters_written_from_outside():
    params = parameters(torch.float16)
    optimizer = trained(deepfast.AdamW, params)
    with torch.no_grad():
        params[0].fill_(3.0)
    optimizer.refresh_master()
    give_gradients(params, scale=0.0)
    optimizer.step()
    assert (params[0] - 3.0).abs().max() < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_place_writes_from_outside_are_noticed(dtype, backend):
    """Clamping, loading a model, swapping in averages: with torch's optimizer they hold, so they hold here."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40).to(dtype)
    optimizer = deepfast.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, backend=backend)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    masters = [optimizer.get_master(p) for p in model.parameters()]
    kept = model.weight.detach().clone()
    with torch.no_grad():
        model.weight[:20] = 3.0
    for p in model.parameters():
        p.grad.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert (model.weight[:20] == 3.0).all()
    assert torch.equal(model.weight[20:], kept[20:])
    # What was not written keeps what only the master knows.
    assert torch.equal(optimizer.get_master(model.weight)[20:], masters[0][20:])
    assert torch.equal(optimizer.get_master(model.bias), masters[1])
    for p in model.parameters():  # also of a parameter that a step in between has left out
        p.grad = None
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer.add_param_group({"params": [other]})
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.load_state_dict({k: torch.full_like(v, 2.0) for k, v in model.state_dict().items()})
    optimizer.step()
    assert all((p == 2.0).all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_state_without_stepping(name):
    """Initialising state by a step with zero gradients starts bias correction at 2."""
    ours, theirs = parameters(torch.float16), parameters(torch.float16)
    before = [p.detach().clone() for p in ours]
    early, late = OURS[name](ours, **TYPICAL[name]), OURS[name](theirs, **TYPICAL[name])
    early.init_state()
    assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    assert all(torch.equal(early.get_master(p), p.float()) for p in ours)
    assert all(early.state[p].get("step", 0) == 0 for p in ours)
    give_gradients(ours, theirs)
    early.step(), late.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_weight_with_a_master_saturates_and_one_without_overflows():
    for master, expected in (("fp32", 65504.0), ("none", float("inf"))):
        p = nn.Parameter(torch.full((40,), 65504.0, dtype=torch.float16))
        p.grad = torch.full((40,), -1.0, dtype=torch.float16)
        deepfast.AdamW([p], lr=100.0, weight_decay=0.0, master=master).step()
        assert (p == expected).all(), master


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_may_change_its_dtype_between_steps(backend):
    p = nn.Parameter(torch.ones(8).half())
    optimizer = deepfast.AdamW([p], lr=0.1, backend=backend)
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float32):
        p.data, p.grad = p.data.to(dtype), None
        p.grad = torch.ones(8, dtype=dtype)
        before = p.detach().clone()
        optimizer.step()
        assert (p < before).all()
        assert ("master" in optimizer.state[p]) == (dtype != torch.float32)


def test_a_master_that_went_through_torch_is_not_believed():
    ours = parameters(torch.float16)
    state = trained(deepfast.AdamW, ours).state_dict()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    torchs = torch.optim.AdamW(theirs)
    torchs.load_state_dict(state)
    for i in range(5):
        give_gradients(theirs, seed=i)
        torchs.step()
    back = deepfast.AdamW(theirs)
    back.load_state_dict(torchs.state_dict())
    assert all(torch.equal(back.get_master(p), p.float()) for p in theirs)


def test_rounding_of_masters_is_stated_in_the_reference():
    x = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, float("inf"), float("nan"), 65520.0, -70000.0])
    bf16 = reference.round_master(x, torch.bfloat16)
    assert bf16[:3].tolist() == [1.0078125, 1.015625, -1.0078125]  # half away from zero
    assert bf16[3] == torch.finfo(torch.bfloat16).max
    assert bf16[4] == float("inf")
    assert bf16[5].isnan()
    fp16 = reference.round_master(x, torch.float16)
    assert fp16[6:].tolist() == [65504.0, -65504.0]
