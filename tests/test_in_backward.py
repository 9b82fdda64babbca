"""Gradient release: the same steps, one gradient at a time; what cannot work with it says so."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from cases import NAMES, OURS, TYPICAL
from torch import nn

import deepfast


class Net(nn.Module):
    """With a weight that is used twice, one that is frozen and one that is not used."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(20, 20, dtype=dtype), nn.Linear(20, 3, dtype=dtype)
        self.idle = nn.Parameter(torch.ones(4, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x))))).float().square().mean()


def batch(i, dtype):
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(i)).to(dtype)


def train(net, optimizer, steps=5, scheduler=None):
    dtype = net.idle.dtype
    for i in range(steps):
        net(batch(i, dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "bf16"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"first_moment": "int8"}),
        (torch.bfloat16, {"master": "none", "rounding": "stochastic"}),
    ],
)
def test_it_gives_the_bits_of_ordinary_steps(name, dtype, options):
    if "first_moment" in options:
        first = {"SGD": "momentum_buffer", "Adagrad": "sum"}.get(name, "exp_avg")
        options = {"state_dtype": {first: options["first_moment"]}}
    nets = [Net(dtype), Net(dtype)]
    for released, net in enumerate(nets):
        groups = [
            {"params": [*net.first.parameters(), net.frozen]},
            {"params": [*net.second.parameters(), net.idle], "lr": 0.02},
        ]
        optimizer = OURS[name](groups, lr=0.01, **TYPICAL[name], **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if released:
            deepfast.step_in_backward(optimizer)
        train(net, optimizer, scheduler=scheduler)
        assert optimizer.param_groups[0]["lr"] < 0.001
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(nets[0].first.weight, Net(dtype).first.weight)


def test_gradients_go_as_soon_as_they_have_been_used():
    net = nn.Sequential(*(nn.Linear(30, 30) for _ in range(12)))
    optimizer = deepfast.AdamW(net.parameters(), lr=1e-3)
    deepfast.step_in_backward(optimizer)
    held = []
    for p in net.parameters():
        p.register_hook(lambda _: held.append(sum(q.grad is not None for q in net.parameters())))
    net(torch.ones(2, 30)).sum().backward()
    assert len(held) == 24
    assert max(held) == 0
    assert all(p.grad is None for p in net.parameters())
    assert all(optimizer.state[p]["step"] == 1 for p in net.parameters())


def test_it_can_be_taken_back_and_is_not_copied():
    net = Net()
    optimizer = deepfast.AdamW(net.parameters(), lr=0.01)
    handle = deepfast.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="in backward already"):
        deepfast.step_in_backward(optimizer)
    train(net, optimizer, 1)
    assert copy.deepcopy(optimizer)._in_backward is None
    handle.remove()
    before = net.first.weight.detach().clone()
    net(batch(1, torch.float32)).backward()
    assert torch.equal(net.first.weight, before)
    optimizer.step()
    assert not torch.equal(net.first.weight, before)


def test_a_closure_and_state_that_is_loaded_in_between():
    nets = [Net(), Net()]
    optimizers = [deepfast.AdamW(net.parameters(), lr=0.01) for net in nets]
    deepfast.step_in_backward(optimizers[1])

    def closure(net, i):
        loss = net(batch(i, torch.float32))
        loss.backward()
        return loss.item()

    for i in range(3):
        losses = [o.step(lambda net=net, i=i: closure(net, i)) for o, net in zip(optimizers, nets, strict=True)]
        assert losses[0] == losses[1]
        for o in optimizers:
            o.zero_grad()
            o.load_state_dict(copy.deepcopy(o.state_dict()))
    assert torch.equal(nets[0].first.weight, nets[1].first.weight)


@pytest.mark.parametrize("before", ["forward", "step"])
@pytest.mark.parametrize("how", ["unfrozen", "frozen for a while", "added", "exchanged"])
def test_parameters_that_are_to_be_trained_later_are(how, before):
    nets = [Net(), Net()]
    for released, net in enumerate(nets):
        late = [*net.first.parameters()]
        known = late if how in ("unfrozen", "frozen for a while") else [nn.Parameter(torch.ones(2))]
        for p in late:
            p.requires_grad_(how not in ("unfrozen", "added"))
        optimizer = deepfast.AdamW([*net.second.parameters(), *known], lr=0.01)
        if released:
            handle = deepfast.step_in_backward(optimizer)
        if how in ("frozen for a while", "exchanged"):
            for p in late:
                p.requires_grad_(False)
        for i in range(4):
            if i == 2 and before == "forward":
                begin(how, optimizer, late)
            net(batch(i, torch.float32)).backward()
            if i == 2 and before == "step":
                begin(how, optimizer, late)
            optimizer.step()
            assert not released or all(p.grad is None for p in net.parameters())
            optimizer.zero_grad()
        assert optimizer.state[late[0]]["step"] == (2 if before == "forward" else 1)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)
    net(batch(4, torch.float32)).backward()
    assert all(p.grad is None for p in net.parameters())  # in backward, too
    handle.remove()
    net(batch(5, torch.float32)).backward()
    assert all(p.grad is not None for p in late)


def begin(how, optimizer, late):
    for p in late:
        p.requires_grad_(True)
    if how == "added":
        optimizer.add_param_group({"params": late, "lr": 0.02})
    if how == "exchanged":
        optimizer.param_groups[0]["params"][2:] = late


def test_an_optimizer_that_is_gone_steps_no_more():
    net = Net()
    deepfast.step_in_backward(deepfast.AdamW(net.parameters(), lr=0.01))
    gc.collect()
    net(batch(0, torch.float32)).backward()
    assert net.first.weight.grad is not None


def test_a_model_that_was_trained_is_freed():
    net = Net()
    optimizer = deepfast.AdamW(net.parameters(), lr=0.01)
    deepfast.step_in_backward(optimizer)
    train(net, optimizer, 1)
    weights = [weakref.ref(p) for p in net.parameters()]
    del net, optimizer
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_what_cannot_work_is_refused(monkeypatch):
    net = Net()
    with pytest.raises(TypeError, match="takes an optimizer of deepfast, not AdamW"):
        deepfast.step_in_backward(torch.optim.AdamW(net.parameters()))
    with pytest.raises(RuntimeError, match="max_grad_norm clips by the norm of all gradients"):
        deepfast.step_in_backward(deepfast.AdamW(net.parameters(), max_grad_norm=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="several ranks"):
            deepfast.step_in_backward(deepfast.AdamW(net.parameters()))
    optimizer = deepfast.AdamW(net.parameters(), lr=0.01)
    deepfast.step_in_backward(optimizer)
    with pytest.raises(deepfast.errors.ConfigError, match="no step_in_backward"):
        deepfast.initialize(model=net, optimizer=optimizer, config={"train_batch_size": 1})
    net(batch(0, torch.float32)).backward()
    with pytest.raises(RuntimeError, match="gradients cannot be accumulated"):
        net(batch(0, torch.float32)).backward()
    optimizer.step()
    net(batch(0, torch.float32)).backward()
    with pytest.raises(RuntimeError, match="a loss scaler decides"):
        deepfast.LossScaler().step(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="a loss scaler decides"):
        scaler.step(optimizer)
    del optimizer.grad_scale, optimizer.found_inf  # the scaler has not come to that
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        net(batch(0, torch.float32)).backward()
