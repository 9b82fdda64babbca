"""An optimizer's state: for whom it is made, and that looking at it takes no time."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from cases import BACKENDS, NAMES, OURS, TYPICAL, parameters, stepped
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deepfast

# For whom it is made.


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Adagrad"])
def test_frozen_parameters_get_no_state_beforehand(name):
    frozen = [
        nn.Parameter(torch.zeros(8, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.int8, torch.float32, torch.float16)
    ]
    trained = parameters(torch.float16)
    optimizer = OURS[name](frozen + trained, **TYPICAL[name])
    optimizer.init_state()
    assert optimizer.state.keys() == set(trained)
    frozen[3].requires_grad_().grad = torch.ones(8, dtype=torch.float16)
    optimizer.step()
    assert frozen[3].any(), "it gets it with its first gradient"


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_counts_have_torchs_type(default, dtype):
    """fp64 under a default of fp64; where a kernel reads them fp32, as in torch's fused optimizers."""
    made = []
    torch.set_default_dtype(default)
    try:
        for cls, fused in ((deepfast.AdamW, None), (torch.optim.AdamW, dtype == torch.float32)):
            p = nn.Parameter(torch.ones(4, dtype=dtype))
            optimizer = cls([p], lr=0.1, fused=fused)
            for _ in range(2):
                p.grad = torch.ones(4, dtype=dtype)
                optimizer.step()
            made.append((optimizer.state[p]["step"], p))
    finally:
        torch.set_default_dtype(torch.float32)
    (step, p), (expected, q) = made
    assert step.dtype == expected.dtype
    assert step == 2
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["swapped", "put into the group"])
def test_parameters_without_memory_and_then_with(name, how):
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    optimizer = OURS[name](net.parameters(), lr=0.1, fused=True, **TYPICAL[name])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of support"
    ):
        optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(how == "swapped")
    try:
        net.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if how != "swapped":
        optimizer.param_groups[0]["params"] = list(net.parameters())
    for p in net.parameters():
        nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_memory_are_taken(name):
    """To see how much a training would need."""
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    optimizer = OURS[name]([p], max_grad_norm=1.0, **TYPICAL[name])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(v.is_meta for v in optimizer.state[p].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "reset_grad": True}])
@pytest.mark.parametrize("name", NAMES)
def test_fake_steps_leave_real_ones_alone(name, options, dtype):
    def train(*sizes):
        params = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
        optimizer = OURS[name](params, lr=0.1, **options, **TYPICAL[name])
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return optimizer, params

    deepfast.optim.decide._RECORDS.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with FakeTensorMode():
                for shapes in (((700, 1000), (3,)), ((5000,),), ((3,),)):
                    optimizer, params = train(*shapes)
                    assert all(type(v) is not torch.Tensor for p in params for v in optimizer.state[p].values())
            _, params = train((4,), (3,))
            assert all((p < 1).all() for p in params)


# Looking at it.


def plans(optimizer, monkeypatch):
    made = []
    plan = optimizer._plan
    monkeypatch.setattr(optimizer, "_plan", lambda: (made.append(1), plan()))
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "odd",
    ["nothing", "frozen uint8", "frozen fp64", "frozen complex", "trained fp64", "trained complex",
     "a key of one's own", "a plain dict", "all plain dicts", "another optimizer's writes", "a copy's writes"],
)  # fmt: skip
def test_one_odd_thing_makes_no_plan_at_each_step(odd, backend, monkeypatch):
    params = parameters()
    kind, _, dtype = odd.partition(" ")
    if kind in ("frozen", "trained"):
        dtype = {"uint8": torch.uint8, "fp64": torch.float64, "complex": torch.complex64}[dtype]
        params.append(nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=kind == "trained"))
    twin = copy.deepcopy(params)
    optimizer, torchs = (cls(ps, lr=0.1) for cls, ps in ((deepfast.AdamW, params), (torch.optim.AdamW, twin)))
    optimizer.backend = backend
    other = deepfast.SGD([nn.Parameter(torch.ones(1))])

    def steps(count):
        for i in range(count):
            for p, q in zip(params, twin, strict=True):
                p.grad = q.grad = (
                    torch.sin(torch.arange(p.numel()) + i).reshape(p.shape).to(p) if p.requires_grad else None
                )
            other.state["mine"] = i
            optimizer.step(), torchs.step()
        for p, q in zip(params, twin, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    steps(1)
    if odd == "a key of one's own":
        optimizer.state["mine"] = 3
    elif odd == "a plain dict":
        optimizer.state[params[0]] = dict(optimizer.state[params[0]])
    elif odd == "all plain dicts":
        optimizer.state = {p: dict(state) for p, state in optimizer.state.items()}
    elif odd == "a copy's writes":
        other = copy.deepcopy(optimizer)
    steps(1)
    made = plans(optimizer, monkeypatch)
    steps(4)
    assert not made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["its dict", "the whole state", "another optimizer's"])
def test_writes_into_dictionaries_that_nobody_watches_are_seen(where, backend):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a, b = deepfast.AdamW([p], lr=0.1, backend=backend), torch.optim.AdamW([q], lr=0.1)

    def both():
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        a.step(), b.step()
        torch.testing.assert_close(p, q)

    both()
    if where == "another optimizer's":
        other = deepfast.AdamW([p])
        other.state[p].update(a.state[p])
        a.state[p] = other.state[p]
    elif where == "its dict":
        a.state[p] = dict(a.state[p])
    else:
        a.state = {p: dict(a.state[p])}
    both(), both()
    for value in (5.0, 0.0):
        a.state[p]["exp_avg"] = torch.full((3,), value)
        b.state[q]["exp_avg"] = torch.full((3,), value)
        both(), both()
    a.state[p]["step"], b.state[q]["step"] = 50, torch.tensor(50.0)
    both(), both()
    a.state[p], b.state[q] = {}, {}
    both(), both()
    if where == "the whole state":
        del a.state[p], b.state[q]
        a.state[p] = {}
        both(), both()


def test_states_are_copied_as_ordinary_dictionaries():
    optimizer = stepped(parameters())
    for clone in (copy.copy(optimizer.state), optimizer.state.copy()):
        assert type(clone[object()]) is dict
    entry = next(iter(optimizer.state.values()))
    assert type(copy.deepcopy(entry)) is type(pickle.loads(pickle.dumps(entry))) is dict  # noqa: S301


def test_a_gradient_that_no_kernel_takes_is_not_remembered():
    """The reference steps while it comes; the kernels again afterwards."""
    p = nn.Parameter(torch.ones(3))
    p.grad_dtype = None
    optimizer = deepfast.AdamW([p], lr=0.1)
    for dtype, kept in ((torch.float64, False), (torch.float32, True), (torch.float64, False), (torch.float32, True)):
        for _ in range(2):
            p.grad = torch.ones(3, dtype=dtype)
            optimizer.step()
        assert (optimizer._planned is not None) == kept


@pytest.mark.parametrize("shapes", [[(0,)], [(5000,), (0,)], [(0,), (5000,), (0, 3)]])
def test_parameters_without_elements_have_state(shapes):
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = stepped(params)
    assert [optimizer.state[p]["exp_avg"].shape for p in params] == [p.shape for p in params]
