"""State that is saved, loaded and copied: to and from torch's optimizers, and what does not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import DROPINS, NAMES, OURS, PEERS, TYPICAL, difference, give_gradients, parameters, trained
from torch import nn

import deepfast


@pytest.mark.parametrize("options", ["plain", "typical"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
@pytest.mark.parametrize("target", ["ours", "theirs"])
@pytest.mark.parametrize("name", DROPINS)
def test_state_dict_loads_both_ways(name, source, target, options):
    classes = {"ours": OURS[name], "theirs": PEERS[name]}
    ours, options = parameters(), TYPICAL[name] if options == "typical" else {}
    first = trained(classes[source], ours, **options)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    second = classes[target](theirs, lr=1.0, **options)
    second.load_state_dict(state)
    assert second.param_groups[0]["lr"] == 1e-2
    for i in range(3, 6):
        give_gradients(ours, theirs, seed=i)
        first.step(), second.step()
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", DROPINS)
@pytest.mark.parametrize("options", ["plain", "typical"])
def test_state_dict_has_torchs_keys(name, options):
    ours, theirs, options = parameters(), parameters(), TYPICAL[name] if options == "typical" else {}
    mine, torchs = (trained(c[name], p, **options).state_dict() for c, p in ((OURS, ours), (PEERS, theirs)))
    assert mine["param_groups"][0].keys() == torchs["param_groups"][0].keys()
    assert mine["state"].keys() == torchs["state"].keys()
    for i, values in mine["state"].items():
        extra = {"step"} if "momentum_buffer" in values else set()
        assert values.keys() == torchs["state"][i].keys() | extra
        for k, v in values.items():
            if k in extra:
                continue
            assert (v.shape, v.dtype) == (torchs["state"][i][k].shape, torchs["state"][i][k].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_loading_keeps_fp32_states_fp32(name, dtype):
    """Torch casts loaded moments to the parameter's dtype."""
    ours = parameters(dtype)
    first = trained(OURS[name], ours, **TYPICAL[name])
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    second = OURS[name](theirs, **TYPICAL[name])
    second.load_state_dict(first.state_dict())
    for a, b in zip(ours, theirs, strict=True):
        for key, value in first.state[a].items():
            assert second.state[b][key].dtype == (torch.int16 if key == "master" else torch.float32)
            assert torch.equal(second.state[b][key], value), key
    give_gradients(ours, theirs, seed=9)
    first.step(), second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_loading_copies_in_place():
    params = parameters(torch.float16)
    optimizer = trained(deepfast.AdamW, params)
    saved = copy.deepcopy(optimizer.state_dict())
    places = [v.data_ptr() for s in optimizer.state.values() for v in s.values() if v.numel()]
    give_gradients(params, seed=5)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert places == [v.data_ptr() for s in optimizer.state.values() for v in s.values() if v.numel()]
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], saved["state"][0]["exp_avg"])


def test_a_foreign_state_is_refused():
    params = parameters()
    state = trained(torch.optim.SGD, parameters(), momentum=0.9).state_dict()
    with pytest.raises(ValueError, match=r"no 'exp_avg'.*momentum_buffer.*AdamW"):
        deepfast.AdamW(params).load_state_dict(state)


def test_load_hooks_see_our_state():
    params = parameters(torch.float16)
    saved = trained(deepfast.AdamW, parameters(torch.float16)).state_dict()
    optimizer = deepfast.AdamW(params)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["exp_avg"].dtype))
    optimizer.load_state_dict(saved)
    assert seen == ["before", torch.float32]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent_and_go_on_alike(name, clone):
    params = parameters(torch.float16)
    optimizer = trained(OURS[name], params, **TYPICAL[name])
    twin = clone(optimizer)
    others = [p for g in twin.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in params]
    give_gradients(others, seed=7)
    twin.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    give_gradients(params, seed=7)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_state_that_does_not_fit_changes_nothing():
    params = parameters()
    optimizer = trained(deepfast.AdamW, params)
    before = copy.deepcopy(optimizer.state_dict())
    for spoil, message in (
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(1)), "'exp_avg' has shape"),
        (lambda s: s["state"][1].pop("exp_avg_sq"), "no 'exp_avg_sq'"),
        (lambda s: s["state"][0].update(master=torch.zeros(1)), "'master' has shape"),
        (lambda s: s["state"][0].update(step=torch.zeros(2)), "'step' has shape"),
        (lambda s: s["param_groups"][0].update(differentiable=True), "differentiable"),
    ):
        spoilt = copy.deepcopy(before)
        spoilt["param_groups"][0]["lr"] = 7.0
        spoil(spoilt)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(spoilt)
        assert optimizer.param_groups[0]["lr"] == 1e-2
        for i, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(v, before["state"][i][k]) for k, v in values.items())


def test_loading_keeps_the_group_dicts():
    """A scheduler that was handed the groups goes on steering them."""
    params = parameters()
    optimizer = trained(deepfast.AdamW, params)
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0] is group
