"""Parameters and gradients that lie in the same memory as others; parameters that leave; masters that follow."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import BACKENDS, NAMES, OURS, TYPICAL
from torch import nn

import deepfast
from deepfast import reference


def with_grad(t, value=1.0):
    p = nn.Parameter(t)
    p.grad = torch.full_like(p, value)
    return p


@pytest.fixture
def plans(monkeypatch):
    """How many plans have been made."""
    made = []
    plan = deepfast.optim.base.Optimizer._plan
    monkeypatch.setattr(deepfast.optim.base.Optimizer, "_plan", lambda self: (made.append(self), plan(self))[1])
    return made


# Two parameters on one memory (`decoder.weight.data = encoder.weight.data`): both updates happen, one after the other.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_on_one_memory_get_both_updates(dtype, backend):
    a, b = with_grad(torch.zeros(100_000, dtype=dtype), 1.0), with_grad(torch.zeros(100_000, dtype=dtype), 2.0)
    b.data = a.data
    optimizer = deepfast.SGD([a, b], lr=1.0, backend=backend)
    for step in range(1, 4):
        optimizer.step()
        assert a.unique().tolist() == [-3.0 * step]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_that_overlap_in_part_or_come_to_lie_on_each_other_later(dtype):
    memory, other = torch.zeros(150, dtype=dtype), torch.zeros(100, dtype=dtype)
    a, b, c = (with_grad(t) for t in (memory[:100], memory[50:], other))
    optimizer = deepfast.SGD([a, b, c], lr=1.0)
    optimizer.step()
    assert memory.tolist() == [-1.0] * 50 + [-2.0] * 50 + [-1.0] * 50
    c.data = memory[:100]
    optimizer.step()
    assert memory.tolist() == [-3.0] * 50 + [-5.0] * 50 + [-2.0] * 50


def test_interleaved_columns_of_one_tensor_are_each_right():
    full = torch.zeros(40, 6)
    columns = [with_grad(c, i) for i, c in enumerate(full.chunk(3, dim=1))]
    deepfast.SGD(columns, lr=1.0).step()
    assert full.unique(dim=0).tolist() == [[0.0, 0.0, -1.0, -1.0, -2.0, -2.0]]


# One gradient for two parameters, and a step that writes to gradients.


def two_launches(kind):
    a, b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    if kind == "momentum in one group":
        return a, b, [{"params": [a]}, {"params": [b], "momentum": 0.9}], "auto"
    return a, b, [a, b], "reference" if kind == "reference" else "auto"


@pytest.mark.parametrize("kind", ["one group", "momentum in one group", "reference"])
@pytest.mark.parametrize("shared", ["whole", "in part"])
def test_a_gradient_that_two_parameters_share_is_not_reset_before_both_have_read_it(kind, shared):
    a, b, groups, backend = two_launches(kind)
    memory = torch.ones(9)
    a.grad, b.grad = memory[:6], memory[:6] if shared == "whole" else memory[3:]
    with pytest.raises(RuntimeError, match="share one gradient tensor"):
        deepfast.SGD(groups, lr=0.5, reset_grad=True, backend=backend).step()
    assert (a == 1).all()
    assert (b == 1).all()
    deepfast.SGD(groups, lr=0.5, backend=backend).step()
    assert (a == 0.5).all()
    assert (b == 0.5).all()


def test_neighbouring_gradients_of_one_buffer_may_be_reset():
    a, b, groups, _ = two_launches("momentum in one group")
    memory = torch.ones(12)
    a.grad, b.grad = memory[:6], memory[6:]
    deepfast.SGD(groups, lr=0.5, reset_grad=True).step()
    assert not memory.any()


# Parameters that leave are freed, their gradients, too.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_are_replaced_are_freed(dtype, backend):
    optimizer = deepfast.AdamW([with_grad(torch.ones(50, dtype=dtype))], backend=backend)
    alive = []
    for _ in range(10):
        optimizer.step()
        old = optimizer.param_groups[0]["params"][0]
        alive += [weakref.ref(old), weakref.ref(old.grad)]
        optimizer.state.pop(old)
        optimizer.param_groups[0]["params"][0] = with_grad(torch.ones(50, dtype=dtype))
        optimizer.zero_grad()
        del old
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        optimizer.param_groups[0]["params"][0].grad = torch.ones(50, dtype=dtype)


def test_groups_that_are_taken_out_are_freed_at_the_next_step():
    groups = [{"params": [with_grad(torch.ones(5))]} for _ in range(10)]
    alive = [weakref.ref(group["params"][0]) for group in groups]
    optimizer = deepfast.SGD(groups)
    optimizer.step()
    del optimizer.param_groups[2:], groups
    optimizer.step()
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 2


# torch exchanges the tensors behind two Python objects.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_has_been_stepped_can_be_exchanged(dtype, backend):
    p, q = with_grad(torch.ones(4, dtype=dtype)), nn.Parameter(torch.full((4,), 8.0, dtype=dtype))
    optimizer = deepfast.SGD([p], lr=0.5, momentum=0.5, backend=backend)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, q)
    assert p.tolist() == [8.0] * 4
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == [8.0 - 0.5 * 1.5] * 4
    assert q.tolist() == [0.5] * 4
    del q
    gc.collect()
    optimizer.step()
    assert p.tolist() == [8.0 - 0.5 * 1.5 - 0.5 * 1.75] * 4


def test_swapping_that_is_turned_on_after_steps():
    net = nn.Linear(4, 3)
    optimizer = deepfast.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})
        net.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    net(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert (net.weight < -0.05).all()


# Masters follow their weights, without a new plan.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_write_from_outside_is_taken_over_where_it_was_made(name, dtype, backend, plans):
    """As open_clip clamps its temperature after each step."""
    g = torch.Generator().manual_seed(0)
    shapes = [(), (33, 65), (70, 3)]
    values = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    values[2] = values[2].t()  # dense, in another order
    ps, qs = ([nn.Parameter(v.clone()) for v in values] for _ in "ab")
    a = OURS[name](ps, lr=0.01, backend=backend, **TYPICAL[name])
    b = OURS[name](qs, lr=0.01, backend="reference", **TYPICAL[name])
    for step in range(4):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            q.grad = p.grad.clone()
        for params in (ps, qs):
            with torch.no_grad():
                params[0].clamp_(-0.25, 0.25)
                if step % 2:
                    params[2][:1].mul_(1.5)
        untouched = [a.get_master(p) for p in ps if p in a.state]
        made = len(plans)
        a.step(), b.step()
        assert step == 0 or len([o for o in plans[made:] if o is a]) == 0
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(a.get_master(p), b.get_master(q), rtol=1e-5, atol=1e-6)
            assert (reference.round_master(a.get_master(p), dtype) == p).all()
        assert not untouched or not torch.equal(untouched[1], ps[1].float())  # more than its 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_views_of_one_buffer_keep_what_their_masters_know(momentum, dtype, plans):
    """autograd counts writes to all of them together, so each step looks like a write from outside to the others."""
    flat = torch.ones(60, dtype=dtype)
    params = [nn.Parameter(chunk) for chunk in flat.chunk(6)]
    for p in params:
        p.grad = torch.full_like(p, 2.0**-12)
    optimizer = deepfast.SGD([{"params": params[:3]}, {"params": params[3:], "momentum": momentum}], lr=1.0)
    optimizer.step()
    for p in params:
        p.detach()[0] = 2.0  # one write: the refresh of all is seen in what is not written
        assert optimizer.get_master(p)[1] == 1 - 2.0**-12
    optimizer.step()
    assert len(plans) == 1
    for nth, master in enumerate(map(optimizer.get_master, params)):
        assert master[0] < 2.0
        assert master[0] > 1.9
        assert master[1] == 1 - (2.0**-11 if nth < 3 else (2 + momentum) * 2.0**-12)


def test_views_of_one_buffer_are_refreshed_only_when_somebody_has_written(monkeypatch):
    flat = torch.ones(60, dtype=torch.bfloat16)
    params = [with_grad(chunk) for chunk in flat.chunk(6)]
    optimizer = deepfast.SGD([{"params": params[:3]}, {"params": params[3:], "momentum": 0.9}], backend="reference")
    refreshed = []
    monkeypatch.setattr(reference.plan, "refresh", lambda master, weight: refreshed.append(weight))
    for _ in range(4):
        refreshed.clear()
        optimizer.step()
    assert refreshed == []
    flat[0] = 3.0
    params[1].detach().add_(1.0)
    optimizer.step()
    assert len(refreshed) == 6
