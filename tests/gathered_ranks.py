"""Run by test_zero_init.py on four ranks: parts made whole for a while, before fully_shard has them and after."""

from __future__ import annotations

import copy
import datetime
import io
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import deepfast
from deepfast.deepspeed import zero
from deepfast.deepspeed.logs import logger, warning_once
from deepfast.engine import born, whole


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 3)
        self.third = nn.Linear(10, 3, bias=False)
        self.third.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(x) * self.scale + self.third(x)


def plain():
    torch.manual_seed(0)
    return Net()


def in_parts():
    torch.manual_seed(0)
    with zero.Init():
        return Net()


def sharded():
    net = plain()
    mesh = dist.init_device_mesh("cpu", (4,))
    fully_shard(net, mesh=mesh, ignored_params={net.scale})
    return net


def values(net):
    with zero.GatheredParameters(net.parameters()):
        return [p.detach().clone() for p in net.parameters()]


def equal(net, others):
    return all(torch.equal(a, b) for a, b in zip(values(net), others, strict=True))


def check_they_are_ordinary_within(make):
    net, other = make(), plain()
    p, q = net.first.weight, other.first.weight
    kinds = [type(known) for known in net.parameters()]
    before = zero.ZeroParamStatus.NOT_AVAILABLE
    with zero.GatheredParameters(iter([p, net.scale])):
        assert net.first.weight is p
        assert isinstance(p, nn.Parameter)
        assert (p.device, p.shape, p.requires_grad, p.is_leaf) == (q.device, q.shape, True, True)
        assert type(p.data) is type(p.detach()) is torch.Tensor
        assert (p.detach().numpy() == q.detach().numpy()).all()
        assert p.tolist() == q.tolist()
        assert repr(p) == repr(q)
        assert p.ds_status is zero.ZeroParamStatus.AVAILABLE
        assert torch.equal(torch.cat([p, q]), torch.cat([q, q]))
        x = torch.ones(2, 6)
        assert torch.equal(nn.functional.linear(x, p), nn.functional.linear(x, q))
        assert torch.equal(copy.deepcopy(p), q)
        file = io.BytesIO()
        torch.save({"data": p.data, "detached": p.detach()}, file)
        file.seek(0)
        assert all(torch.equal(t, q) for t in torch.load(file).values())
        assert torch.equal(net.state_dict()["first.weight"], q)
    assert [type(known) for known in net.parameters()] == kinds
    assert p.ds_status is before
    assert whole.opened == {}
    assert equal(net, [t.detach() for t in other.parameters()])


def check_one_rank_modifies(make):
    net, other = make(), plain()
    for source, value in ((0, 5.0), (2, 7.0)):
        held = net.first.weight
        with zero.GatheredParameters(net.parameters(), modifier_rank=source), torch.no_grad():
            if dist.get_rank() == source:
                net.first.weight.data.fill_(value)
                held[1] = 0
                net.second.bias.zero_()
                net.third.weight += 1
                net.scale.fill_(value)
            else:
                net.first.bias.fill_(-1.0)
        with torch.no_grad():
            other.first.weight.fill_(value)
            other.first.weight[1] = 0
            other.second.bias.zero_()
            other.third.weight += 1
            other.scale.fill_(value)
        assert equal(net, [t.detach() for t in other.parameters()])


def check_without_a_modifier(make):
    net, other = make(), plain()
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    warning_once.cache_clear()
    try:
        with zero.GatheredParameters(net.first.weight), torch.no_grad():
            net.first.weight.mul_(2)
        other.first.weight.data.mul_(2)
        assert equal(net, [t.detach() for t in other.parameters()])
        assert said == []
        with zero.GatheredParameters([net.first.weight, net.first.bias]), torch.no_grad():
            net.first.bias[-1] = dist.get_rank()
            net.first.weight.mul_(3)
        assert len(said) == 1
        assert "set modifier_rank" in said[0]
    finally:
        logger.removeHandler(handler)
    assert equal(net, [t.detach() for t in other.parameters()])


def check_errors_and_contexts_within(make):
    net, other = make(), plain()
    p = net.first.weight
    with pytest.raises(ZeroDivisionError), zero.GatheredParameters(net.parameters(), modifier_rank=0):
        p.data.fill_(1 / int(p.data.zero_().sum()))
    assert equal(net, [t.detach() for t in other.parameters()])
    with zero.GatheredParameters([p, p, net.first.bias], modifier_rank=1):
        with zero.GatheredParameters(p, modifier_rank=3):
            p.data.fill_(dist.get_rank())
        assert (p == 3).all()
        with zero.GatheredParameters(p, enabled=False):
            p.data.add_(dist.get_rank())
        assert (p == 3 + dist.get_rank()).all()
    other.first.weight.data.fill_(4)
    assert equal(net, [t.detach() for t in other.parameters()])
    with zero.GatheredParameters(p, modifier_rank=0):
        p.requires_grad_(False)
    assert not p.requires_grad


def check_within_init():
    with zero.Init():
        net = Net()
        with zero.GatheredParameters(net.parameters(), modifier_rank=0):
            if dist.get_rank() == 0:  # the others are not asked
                nn.init.constant_(net.first.weight, 3.0)
                net.load_state_dict({**net.state_dict(), "first.bias": torch.ones(10)})
            inner = nn.Linear(6, 6)
            inner.first = net.first  # is whole for now
            holder = nn.Sequential(net)
            assert type(net.first.weight) is nn.Parameter
        assert born.is_born(holder[0].first.weight)
        assert born.is_born(inner.weight)
    with zero.GatheredParameters(net.parameters()):
        assert (net.first.weight == 3).all()
        assert (net.first.bias == 1).all()


def check_a_graph_that_is_alive():
    net = in_parts()
    with zero.GatheredParameters(net.parameters()):
        out = net(torch.ones(2, 6))
        out.sum().backward()
        assert net.first.weight.grad.shape == (10, 6)
        del out
    assert born.any_in(net)
    with pytest.raises(RuntimeError, match="graph that is alive"), zero.GatheredParameters(net.parameters()):
        out = net(torch.ones(2, 6))
    assert whole.opened == {}
    assert not any(hasattr(p, "ds_id") for p in net.parameters()), "they stay whole"
    del out
    zero.Init(module=net)
    assert equal(net, [p.detach() for p in plain().parameters()])


def check_an_optimizer_notices():
    net, other = sharded(), sharded()
    optimizers = [deepfast.AdamW(n.parameters(), lr=0.1) for n in (net, other)]
    x = torch.ones(2, 6)
    for _ in range(3):
        for n, optimizer in zip((net, other), optimizers, strict=True):
            n(x).sum().backward()
            optimizer.step(), optimizer.zero_grad()
            n.reshard()
        p = net.first.weight
        version = p._version
        with zero.GatheredParameters(p):
            pass
        assert p._version == version, "nobody has written"
        with zero.GatheredParameters(p, modifier_rank=0):
            p.data.mul_(2)
        assert isinstance(p, DTensor)
        assert p._version > version
        with torch.no_grad():
            other.first.weight.mul_(2)
    assert equal(net, values(other))


def check_forward_and_backward_within():
    net, other = sharded(), sharded()
    x = torch.ones(2, 6)
    with zero.GatheredParameters(net.first.weight):
        net(x).sum().backward()
        grad = net.first.weight.grad
    other(x).sum().backward()
    assert torch.equal(net.first.weight.grad.full_tensor(), other.first.weight.grad.full_tensor())
    assert grad is net.first.weight.grad
    net.reshard(), other.reshard()
    with zero.GatheredParameters(net.first.weight, modifier_rank=0):
        net.first.weight.data.zero_()
        assert torch.equal(net(x), other(x)), "what it was before"
        net.reshard()
        other.reshard()
    assert (net.first.weight.full_tensor() == 0).all()


def check_what_is_whole_anyway():
    net = plain()
    with zero.GatheredParameters(net.parameters(), modifier_rank=1):
        net.first.weight.data.fill_(dist.get_rank())
    assert (net.first.weight == 1).all()


BOTH = {"before": in_parts, "after": sharded}
CHECKS = {}
for _name, _check in [(n, c) for n, c in vars().items() if n.startswith("check_")]:
    if _check.__code__.co_argcount:
        CHECKS |= {f"{_name[6:]}, {when}": (lambda c=_check, m=make: c(m)) for when, make in BOTH.items()}
    else:
        CHECKS[_name[6:]] = _check

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    run_checks(CHECKS, Path(sys.argv[1], f"{dist.get_rank()}.json"), dist.barrier)
    dist.destroy_process_group()
