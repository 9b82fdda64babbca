"""Adam without its correction of bias, as BERT was trained with: beside groups that have it, saved, made anew."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import BACKENDS, HALVES, OURS, PEERS, difference, give_gradients, kept, parameters, peer_of, trained
from engines import batches, engine, train
from torch import nn

import deepfast
from deepfast.engine import config
from deepfast.engine.config import named
from deepfast.errors import ConfigError

ADAMS = ("Adam", "AdamW")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ADAMS)
def test_groups_with_and_without(name, amsgrad, dtype, backend):
    """Two groups in one launch, each against its own peer in fp64."""
    ours = parameters(dtype)
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad}
    groups = [{"params": ours[::2]}, {"params": ours[1::2], "bias_correction": False}]
    mine = OURS[name](groups, backend=backend, **options)
    peers = [peer_of(name, exact[::2], **options), peer_of(name, exact[1::2], bias_correction=False, **options)]
    for i in range(10):
        give_gradients(ours, seed=i)
        for p, e in zip(ours, exact, strict=True):
            e.grad = p.grad.double()
        mine.step(), *(peer.step() for peer in peers)
    assert difference([kept(mine, p) for p in ours], exact) < 1e-5
    assert all(mine.state[p]["step"] == 10 for p in ours), "they are counted all the same"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAMS)
def test_the_first_step_is_three_times_as_long(name, backend):
    """(1 - 0.9) g / sqrt((1 - 0.999) g^2) = 3.16, the reason why it needs a warm-up."""
    for correction, length in ((True, 1.0), (False, 10**0.5)):
        p = nn.Parameter(torch.zeros(100))
        p.grad = torch.linspace(1, 2, 100)
        OURS[name]([p], lr=0.5, eps=0.0, bias_correction=correction, backend=backend).step()
        torch.testing.assert_close(p.detach(), torch.full((100,), -0.5 * length))


@pytest.mark.parametrize("name", ADAMS)
def test_it_is_read_at_each_step(name):
    ours, theirs = parameters(), parameters()
    a, b = trained(OURS[name], ours), trained(OURS[name], theirs, bias_correction=False)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.detach())
        for key, value in a.state[p].items():
            b.state[q][key].copy_(value)
    before = [p.detach().clone() for p in ours]
    a.param_groups[0]["bias_correction"] = False
    give_gradients(ours, theirs, seed=5)
    a.step(), b.step()
    assert all(map(torch.equal, ours, theirs))
    once = difference(ours, before)
    a.param_groups[0]["bias_correction"] = True
    give_gradients(ours, seed=5)
    before = [p.detach().clone() for p in ours]
    a.step()
    assert difference(ours, before) < once / 2


@pytest.mark.parametrize("name", ADAMS)
def test_a_group_has_torchs_keys_but_for_this_where_it_is_false(name):
    keys = PEERS[name](parameters()).param_groups[0].keys()
    assert OURS[name](parameters(), bias_correction=True).state_dict()["param_groups"][0].keys() == keys
    without = OURS[name](parameters(), bias_correction=False).state_dict()["param_groups"][0]
    assert without.keys() - keys == {"bias_correction"}
    assert without["bias_correction"] is False
    with pytest.raises(TypeError, match="positional"):
        OURS[name](parameters(), 1e-3, (0.9, 0.999), 1e-8, 0.0, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ADAMS)
def test_a_checkpoint_brings_it_along(name, own, dtype):
    ours = parameters(dtype)
    first = trained(OURS[name], ours, bias_correction=False)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    second = OURS[name](theirs, bias_correction=own)
    second.load_state_dict(torch.load(file, weights_only=True))
    for i in range(3):
        give_gradients(ours, theirs, seed=i)
        first.step(), second.step()
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", ADAMS)
def test_torchs_checkpoints_leave_it_be_and_torch_loads_ours(name):
    ours, theirs = parameters(), parameters()
    torchs = trained(PEERS[name], theirs)
    mine = OURS[name](ours, bias_correction=False)
    mine.load_state_dict(torchs.state_dict())
    assert mine.param_groups[0]["bias_correction"] is False
    torchs.load_state_dict(mine.state_dict())
    give_gradients(theirs)
    torchs.step()
    again = OURS[name](parameters())
    again.load_state_dict(torchs.state_dict())
    assert again.param_groups[0]["bias_correction"] is False, "it comes back from there, too"


@pytest.mark.parametrize("way", ["defaults", "groups", "copy", "pickle"])
@pytest.mark.parametrize("name", ADAMS)
def test_an_optimizer_that_is_made_anew_keeps_it(name, way):
    optimizer = OURS[name](parameters(), lr=0.5, eps=0.0, bias_correction=False)
    again = {
        "defaults": lambda o: type(o)(parameters(), **o.defaults),
        "groups": lambda o: type(o)(o.param_groups),
        "copy": copy.deepcopy,
        "pickle": lambda o: pickle.loads(pickle.dumps(o)),  # noqa: S301
    }[way](optimizer)
    p = again.param_groups[0]["params"][0]
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    again.param_groups[0]["weight_decay"] = 0.0
    again.step()
    torch.testing.assert_close(before - p.detach(), torch.full_like(p, 0.5 * 10**0.5))


def test_each_parameter_in_its_backward_pass():
    p = nn.Parameter(torch.zeros(3))
    optimizer = deepfast.AdamW([p], lr=0.5, eps=0.0, bias_correction=False)
    deepfast.step_in_backward(optimizer)
    p.sum().backward()
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.5 * 10**0.5))


def test_a_configuration_says_so():
    def of(kind, **params):
        return named.chosen(
            config.load({"train_batch_size": 1, "optimizer": {"type": kind, "params": params}}).optimizer
        )

    for kind in ADAMS:
        assert of(kind, bias_correction=False) == ("AdamW", {"weight_decay": 0.0, "bias_correction": False})
    with pytest.raises(ConfigError, match="bias_correction: Lion has none"):
        of("Lion", bias_correction=False)


@pytest.mark.parametrize("correction", [True, False])
def test_what_the_configuration_says_holds_after_loading(tmp_path, correction):
    def configured(correction):
        params = {"lr": 0.01, "bias_correction": correction}
        return engine({"optimizer": {"type": "Adam", "params": params}})

    first, second = configured(not correction), configured(correction)
    train(first, batches(1))
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    assert second.optimizer.param_groups[0].get("bias_correction", True) == correction
