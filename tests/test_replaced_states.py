"""State that somebody else has replaced, exchanged, edited or taken away: the next step notices."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import BACKENDS, NAMES
from test_plan import go_on, pair
from torch import nn

import deepfast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_state_that_somebody_has_replaced(name, dtype, backend):
    """Offloading moves the entries away and back, as tensors of its own."""
    ours, a, theirs, b = pair(name, dtype, backend)
    old = [v for s in a.state.values() for v in s.values()]
    for state in a.state.values():
        for key in list(state):
            state[key] = state[key].clone()
    kept = [v.clone() for v in old]
    go_on(ours, a, theirs, b)
    assert all(torch.equal(x, y) for x, y in zip(old, kept, strict=True)), "the step wrote into what was taken out"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_state_whose_memory_somebody_has_replaced(dtype, backend):
    ours, a, theirs, b = pair(dtype=dtype, backend=backend)
    for state in a.state.values():
        for value in state.values():
            value.data = value.data.clone()
    go_on(ours, a, theirs, b)
    for p, q in zip(ours, theirs, strict=True):
        p.data = p.data.clone()
        a.state[p]["exp_avg"].share_memory_()
        assert p.grad is not None, q
    go_on(ours, a, theirs, b, seed=11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_states_that_somebody_has_replaced(backend):
    ours, a, theirs, b = pair(backend=backend)
    for p in ours:
        a.state[p] = {k: v.clone() for k, v in a.state[p].items()}
    go_on(ours, a, theirs, b)
    first, second = ours[0], theirs[0]
    for optimizer, p in ((a, first), (b, second)):
        optimizer.state[p].clear()  # it starts anew
    go_on(ours, a, theirs, b, seed=11)
    assert a.state[first]["step"] == 1
    a.state.clear(), b.state.clear()
    go_on(ours, a, theirs, b, seed=12)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    go_on(ours, a, theirs, b, seed=13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_somebody_has_exchanged(backend):
    ours, a, theirs, b = pair(backend=backend)
    for optimizer, params in ((a, ours), (b, theirs)):
        one, two = optimizer.state[params[1]], optimizer.state[params[2]]
        one["exp_avg"], two["exp_avg"] = two["exp_avg"][:4].clone(), torch.zeros(300)
    b = copy.deepcopy(b)  # has no plan
    go_on(ours, a, [p for g in b.param_groups for p in g["params"]], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_is_transposed_where_it_lies(backend):
    p = nn.Parameter(torch.arange(9.0).reshape(3, 3))
    optimizer = deepfast.AdamW([p], lr=0.1, backend=backend)
    for g in (1.0, 2.0):
        p.grad = torch.arange(9.0).reshape(3, 3) * g
        optimizer.step()
    q = nn.Parameter(p.detach().clone())
    state = copy.deepcopy(optimizer.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][0][key] = state["state"][0][key].t().contiguous()
        moment = optimizer.state[p][key]
        moment.data = moment.data.t()
    p.grad = torch.ones(3, 3)
    optimizer.step()  # the plan is the one of before
    other = deepfast.AdamW([q], lr=0.1, backend=backend)
    other.load_state_dict(state)
    q.grad = torch.ones(3, 3)
    other.step()
    assert torch.equal(p, q)


def test_what_is_moved_away_is_freed():
    """Offloading a state must give its memory back at once."""
    import weakref

    ours, a, theirs, b = pair()
    gone = [weakref.ref(v) for s in a.state.values() for v in s.values()]
    for state in a.state.values():
        for key in list(state):
            state[key] = state[key].clone()
    gc.collect()
    assert not any(ref() is not None for ref in gone)
    go_on(ours, a, theirs, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_somebody_has_edited(backend):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    a, b = deepfast.SGD([p], backend=backend, **options), torch.optim.SGD([q], **options)

    def both():
        p.grad = q.grad = torch.ones(3)
        a.step(), b.step()
        torch.testing.assert_close(p, q)

    both(), both()
    a.state[p]["momentum_buffer"] = b.state[q]["momentum_buffer"] = None
    both(), both()
    del a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"]
    both(), both()
    a.state["mine"] = 5
    a.state[p]["step"] = torch.tensor(7.0, dtype=torch.float64)
    both()
    assert a.state[p]["step"].dtype == torch.float32
    a.load_state_dict(copy.deepcopy(a.state_dict()))
    assert a.state["mine"] == 5
    a.state = {p: dict(a.state[p])}  # nobody watches this one
    both(), both()
    a.state[p]["momentum_buffer"] = a.state[p]["momentum_buffer"] * 0
    b.state[q]["momentum_buffer"].zero_()
    both()


def test_dictionaries_that_leave_are_ordinary_ones():
    import pickle

    ours, a, _, _ = pair()
    assert all(type(s) is dict for s in a.state_dict()["state"].values())
    for clone in (copy.deepcopy(a.state), pickle.loads(pickle.dumps(a.state))):  # noqa: S301
        assert all(type(s) is dict for s in clone.values())
        assert len(clone) == len(ours)
