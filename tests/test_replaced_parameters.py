"""Gaussian splatting: parameters are pruned, grown and set anew in their groups, their state moved over by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepfast


def replace(optimizer, group, weight, moved):
    """As gaussian-splatting's cat_tensors_to_optimizer, _prune_optimizer and replace_tensor_to_optimizer do."""
    old = group["params"][0]
    state = optimizer.state.pop(old, None)
    group["params"][0] = nn.Parameter(weight)
    if state is not None:
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim():
                state[key] = moved(key, value)
        optimizer.state[group["params"][0]] = state


def prune(optimizer, keep):
    for group in optimizer.param_groups:
        replace(optimizer, group, group["params"][0].detach()[keep].clone(), lambda _, value: value[keep])


def grow(optimizer, rows):
    def longer(t):
        return torch.cat([t, torch.zeros(rows, *t.shape[1:], dtype=t.dtype)])

    for group in optimizer.param_groups:
        replace(optimizer, group, longer(group["params"][0].detach()), lambda _, value: longer(value))


def set_anew(optimizer, name):
    group = next(group for group in optimizer.param_groups if group["name"] == name)
    weight = torch.full_like(group["params"][0].detach(), 0.5)
    replace(optimizer, group, weight, lambda key, value: weight.float() if key == "master" else torch.zeros_like(value))


def train(cls, dtype, **options):
    g = torch.Generator().manual_seed(0)
    groups = []
    for columns, name in ((1, "opacity"), (3, "xyz"), (2, "scaling")):
        p = nn.Parameter(torch.randn(30, columns, generator=g).to(dtype))
        groups.append({"params": [p], "lr": 0.1**columns, "name": name})
    optimizer = cls(groups, lr=0.0, eps=1e-15, **options)
    for step in range(40):
        for group in optimizer.param_groups:
            p = group["params"][0]
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows = len(optimizer.param_groups[0]["params"][0])
        if step % 10 == 3:
            prune(optimizer, torch.arange(rows) % 3 != 0)
        if step % 10 == 6:
            grow(optimizer, 7)
        if step == 25:
            set_anew(optimizer, "opacity")
    return optimizer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", [{}, {"reset_grad": True}, {"backend": "reference"}])
def test_as_torchs(dtype, tolerance, options):
    ours, theirs = train(deepfast.Adam, dtype, **options), train(torch.optim.Adam, torch.float64)
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        p, q = a["params"][0], b["params"][0]
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=tolerance, atol=tolerance)
        assert ours.state[p]["step"] == theirs.state[q]["step"] == 40
        assert ours.state[p]["exp_avg"].shape == p.shape
    assert len(ours.state_dict()["state"]) == len(ours.state) == 3
