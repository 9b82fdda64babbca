"""Optimizers that a framework makes anew: no option of ours is lost, and none shows where torch has none."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import DROPINS, NAMES, OURS, PEERS
from torch import nn

import deepfast

OPTIONS = {"max_grad_norm": 0.5, "reset_grad": True, "master": "none", "backend": "reference"}


def parameter():
    return nn.Parameter(torch.ones(4))


def options_of(optimizer):
    return {name: getattr(optimizer, name) for name in OPTIONS}


WAYS = {
    "from its groups": lambda o: type(o)(o.param_groups),
    "from a list of its groups": lambda o: type(o)(list(o.param_groups)),
    "from its defaults": lambda o: o.__class__([parameter()], **o.defaults),
    "deep-copied": copy.deepcopy,
    "pickled": lambda o: pickle.loads(pickle.dumps(o)),  # noqa: S301
    "twice": lambda o: type(o)(type(o)(o.param_groups).param_groups),
    "by a subclass": lambda o: type("Distributed", (type(o),), {})(o.param_groups),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_options_survive(name, way):
    optimizer = OURS[name]([parameter()], lr=0.25, **OPTIONS)
    again = WAYS[way](optimizer)
    assert options_of(again) == OPTIONS
    assert again.param_groups[0]["lr"] == 0.25
    (p,) = again.param_groups[0]["params"]
    p.grad = torch.full((4,), 10.0)
    again.step()
    assert again.grad_norm == 20, "it clips"
    assert not p.grad.any(), "it resets"


@pytest.mark.parametrize("way", WAYS)
def test_options_that_were_set_later_survive(way):
    optimizer = deepfast.AdamW([parameter()], reset_grad=True)
    for name, value in OPTIONS.items():
        setattr(optimizer, name, value)
    assert options_of(WAYS[way](optimizer)) == OPTIONS
    optimizer.max_grad_norm = None
    assert WAYS[way](optimizer).max_grad_norm is None


def test_what_is_said_to_the_new_one_holds():
    optimizer = deepfast.AdamW([parameter()], **OPTIONS)
    again = type(optimizer)(optimizer.param_groups, max_grad_norm=None, reset_grad=False)
    assert (again.max_grad_norm, again.reset_grad, again.master) == (None, False, "none")
    other = deepfast.AdamW([dict(optimizer.param_groups[0], params=[parameter()])])
    assert other.max_grad_norm is None, "not that optimizer's group, but one like it"


@pytest.mark.parametrize("name", DROPINS)
def test_groups_and_state_dicts_have_torchs_keys_whatever_the_options(name):
    p = parameter()
    ours, theirs = OURS[name]([p], **OPTIONS), PEERS[name]([p])
    late = [parameter(), parameter()]
    ours.add_param_group({"params": late[0]})
    theirs.add_param_group({"params": late[1]})
    for mine, torchs in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert type(mine) is dict
        assert list(mine) == list(torchs)
    assert type(ours.param_groups) is list
    theirs.load_state_dict(ours.state_dict())
    assert ours.defaults.items() >= theirs.defaults.items()
    assert ours.defaults.keys() - theirs.defaults.keys() == OPTIONS.keys()


def test_a_group_is_the_very_dictionary_that_was_given():
    group = {"params": [parameter()]}
    assert deepfast.AdamW([group], **OPTIONS).param_groups[0] is group


def test_adamw_is_not_made_into_adam():
    with pytest.raises(ValueError, match="AdamW's weight decay is decoupled: use Adam"):
        deepfast.AdamW([parameter()], decoupled_weight_decay=False)
    with pytest.raises(TypeError, match="unknown option 'learning_rate'"):
        deepfast.AdamW([parameter()], learning_rate=1.0)


def test_nobody_keeps_an_optimizer_alive():
    optimizer = deepfast.AdamW([parameter()], **OPTIONS)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    optimizer.step()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None, "nor a cycle of references, which would keep its state until it is found"
    finally:
        gc.enable()
