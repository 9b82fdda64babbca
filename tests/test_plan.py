"""What a step keeps from the last one: it must notice everything that can change, and grow nothing."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import BACKENDS, NAMES, OURS, TYPICAL, give_gradients, parameters
from torch import nn

import deepfast


def pair(name="AdamW", dtype=torch.float32, backend="cpu", **options):
    """Two optimizers over equal parameters, three steps into the same training."""
    made = []
    for _ in range(2):
        params = parameters(dtype, shapes=[(7, 5), (4,), (300,)])
        made.append((params, OURS[name](params, lr=0.01, backend=backend, **TYPICAL[name], **options)))
    (ours, a), (theirs, b) = made
    for i in range(3):
        give_gradients(ours, theirs, seed=i)
        a.step(), b.step()
    return ours, a, theirs, b


def go_on(ours, a, theirs, b, seed=10):
    """A step on both: equal to the bit, and different from before."""
    before = [p.detach().clone() for p in ours]
    give_gradients(ours, theirs, seed=seed)
    a.step(), b.step()
    for p, q, old in zip(ours, theirs, before, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, old)
        for key, value in a.state[p].items():
            assert torch.equal(value, b.state[q][key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_somebody_has_replaced(backend):
    ours, a, theirs, b = pair(backend=backend)
    gone = ours[0].detach().clone()
    left = ours[0]
    for optimizer, params in ((a, ours), (b, theirs)):
        new = nn.Parameter(torch.ones(2, 2))
        optimizer.state.pop(params[0])
        optimizer.param_groups[0]["params"][0] = params[0] = new
    b = copy.deepcopy(b)
    go_on(ours, a, [p for g in b.param_groups for p in g["params"]], b)
    assert torch.equal(left, gone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_come_and_go(name, backend):
    """Experts that a batch does not reach; a parameter that gets its first gradient late."""
    ours, theirs = (parameters(shapes=[(7, 5), (4,), (300,), (2, 2)]) for _ in range(2))
    a, b = OURS[name](ours, backend=backend, **TYPICAL[name]), OURS[name](theirs, backend=backend, **TYPICAL[name])
    for i in range(12):
        b = copy.deepcopy(b)  # plans anew
        theirs = [p for g in b.param_groups for p in g["params"]]
        give_gradients(ours, theirs, seed=i)
        for params in (ours, theirs):
            for k, p in enumerate(params):
                if (i + k) % 3 == 0 or (k == 3 and i < 8):
                    p.grad = None
        a.step(), b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    for p in ours:
        p.grad = None
    before = [p.detach().clone() for p in ours]
    a.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_first_gradient_that_comes_late(name, backend):
    """With nothing else happening that would make the plan anew."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = OURS[name]([p, q], lr=0.1, backend=backend, **TYPICAL[name])
    p.grad = torch.ones(4)
    for _ in range(3):
        optimizer.step()
    assert (q == 1).all()
    q.grad = torch.ones(4)
    optimizer.step()
    assert (q < 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_change_their_kind(backend):
    """Layout, type, lazy views: noticed at each step."""
    p, q = nn.Parameter(torch.linspace(-1, 1, 35).reshape(7, 5)), nn.Parameter(torch.linspace(-1, 1, 35).reshape(7, 5))
    p.grad_dtype = q.grad_dtype = None
    a, b = deepfast.AdamW([p], lr=0.1, backend=backend), torch.optim.AdamW([q], lr=0.1)
    g = torch.sin(torch.arange(35.0)).reshape(7, 5)
    for grad in (
        g,
        g.t().contiguous().t(),
        g.double(),
        g,
        g.to(torch.bfloat16).to(torch.float16),
        torch.complex(g, g).conj().imag,
        g,
        torch._neg_view(g),
        torch.cat([g, g], 1)[:, ::2],
        g,
        g[:1].expand(7, 5),
    ):
        p.grad, q.grad = grad, grad.float().resolve_neg().contiguous()
        a.step(), b.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_options_that_change():
    p, q = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    a, b = deepfast.SGD([p], lr=0.1, backend="cpu"), torch.optim.SGD([q], lr=0.1)
    for change in (
        {},
        {"momentum": 0.9},
        {"lr": 0.01, "maximize": True},
        {"weight_decay": 0.1},
        {"nesterov": True},
        {"nesterov": False, "dampening": 0.5},
        {"fused": False},
        {"momentum": 0.0},
        {"fused": None},
    ):
        for optimizer in (a, b):
            optimizer.param_groups[0].update(change)
        p.grad = q.grad = torch.linspace(0, 1, 50)
        a.step(), b.step()
        torch.testing.assert_close(p, q)


def test_reset_grad_may_be_switched():
    ours, a, theirs, b = pair()
    a.reset_grad = True
    go_on(ours, a, theirs, b)
    assert not any(p.grad.any() for p in ours)
    a.reset_grad = False
    go_on(ours, a, theirs, b, seed=11)
    assert all(p.grad.any() for p in ours)


def test_a_step_keeps_no_gradient_alive():
    import weakref

    params = parameters()
    optimizer = deepfast.AdamW(params, max_grad_norm=1.0)
    give_gradients(params)
    optimizer.step()
    grads = [weakref.ref(p.grad) for p in params]
    storages = [p.grad.untyped_storage()._weak_ref() for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert all(grad() is None for grad in grads)
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_number_of_live_objects_stays_flat(name, dtype):
    params = parameters(dtype, shapes=[(4, 3)] * 20)
    optimizer = OURS[name](params, max_grad_norm=1.0, **TYPICAL[name])
    scaler = deepfast.LossScaler(init_scale=2.0)

    def steps(count):
        for i in range(count):
            give_gradients(params, seed=i % 3)
            scaler.step(optimizer)
            scaler.update()
        gc.collect()
        alive = gc.get_objects()
        return len(alive), sum(issubclass(type(o), torch.Tensor) for o in alive)

    before = steps(20)
    after = steps(1000)
    assert after[1] <= before[1]  # fewer: what an earlier test has left went meanwhile
    assert after[0] <= before[0] + 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["init_state", "adagrad", "loaded", "copied", "address"])
def test_writes_before_the_first_step_are_noticed(how, backend):
    """A master is made, the weights are loaded after it: the weights count."""
    p = nn.Parameter(torch.zeros(50, dtype=torch.bfloat16))
    cls = deepfast.Adagrad if how == "adagrad" else deepfast.AdamW
    optimizer = cls([p], lr=1e-3, backend=backend)
    if how == "init_state":
        optimizer.init_state()
    elif how in ("loaded", "copied", "address"):
        p.grad = torch.ones_like(p)
        optimizer.step()
    if how == "loaded":
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0].pop("master")
        optimizer = cls([p], lr=1e-3, backend=backend)
        optimizer.load_state_dict(state)
    elif how == "copied":
        optimizer = copy.deepcopy(optimizer)
        (p,) = optimizer.param_groups[0]["params"]
    if how == "address":
        torch.nn.utils.vector_to_parameters(torch.full((50,), 5.0, dtype=torch.bfloat16), [p])
    else:
        with torch.no_grad():
            p.fill_(5.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p > 4.9).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_whose_shape_changes(name, backend):
    """``.data`` may become another view at the same address."""
    p = nn.Parameter(torch.arange(9.0).reshape(3, 3))
    q = nn.Parameter(p.detach().clone())
    a, b = (OURS[name]([t], lr=0.1, backend=backend, **TYPICAL[name]) for t in (p, q))
    p.grad, q.grad = torch.ones(3, 3), torch.ones(3, 3)
    a.step(), b.step()
    p.grad = None
    p.data = p.data.t()
    p.grad = torch.empty_like(p).copy_(torch.arange(9.0).reshape(3, 3))
    q.grad = torch.arange(9.0).reshape(3, 3).t().contiguous()
    for key, value in b.state[q].items():  # the parameter is another now, its moments are where they were
        if key != "step":
            value.copy_(value.t().clone())
    a.step(), b.step()
    torch.testing.assert_close(p.t(), q)
    p.grad = None
    p.data = p.data.t()[:1]
    p.grad = torch.ones(1, 3)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        a.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_move_between_groups(backend):
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [a, b], "lr": 0.1}, {"params": [c], "lr": 0.0}]
    optimizer = deepfast.SGD(groups, backend=backend)
    for p in (a, b, c):
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    optimizer.step()
    torch.testing.assert_close(torch.stack([a, b, c]), torch.tensor([[0.8], [0.9], [1.0]]).expand(3, 3))


def test_torch_may_exchange_modules_parameters():
    net = nn.Linear(4, 3)
    optimizer = deepfast.AdamW(net.parameters(), lr=0.1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            net.to(dtype)
            net.load_state_dict({k: torch.ones_like(v) for k, v in net.state_dict().items()})
            optimizer.zero_grad()
            net(torch.ones(2, 4, dtype=dtype)).sum().backward()
            optimizer.step()
            assert (net.weight < 1).all()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_wrapper_subclasses_go_through_the_reference():
    from torch.testing._internal.two_tensor import TwoTensor

    p = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    q = nn.Parameter(torch.ones(3))
    a, b = deepfast.AdamW([p], lr=0.1), deepfast.AdamW([q], lr=0.1)
    for _ in range(3):
        p.grad, q.grad = TwoTensor(torch.ones(3), torch.ones(3)), torch.ones(3)
        a.step(), b.step()
    assert isinstance(a.state[p]["exp_avg"], TwoTensor)
    torch.testing.assert_close(p.a, q.detach())


def test_a_parameter_in_a_group_twice_is_refused():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = deepfast.AdamW([p, p])
    with pytest.raises(RuntimeError, match=r"shape \(3,\) is in the groups twice"):
        optimizer.step()
