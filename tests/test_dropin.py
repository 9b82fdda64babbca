"""torch's own tables of optimizer inputs and errors, and the trainings that people write, on both."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import DROPINS, OURS, PEERS
from torch import nn
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls in PEERS.values()}
INPUTS = [(name, sample) for name, info in INFOS.items() for sample in info.optim_inputs_func(device="cpu")]
ERRORS = [
    (name, error)
    for name, info in INFOS.items()
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


def ids(cases, describe):
    return [f"{name}-{describe(case)}" for name, case in cases]


def test_the_tables_are_there():
    assert set(INFOS) == set(DROPINS)
    assert len(INPUTS) >= 26
    assert len(ERRORS) >= 30


def train(cls, options, dtype=torch.float32, steps=12, scheduler=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)).to(dtype)
    optimizer = cls(net.parameters(), **copy.deepcopy(options))
    scheduled = scheduler(optimizer) if scheduler else None
    x = torch.randn(16, 4, dtype=dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - x.sum(-1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        if scheduled is not None:
            scheduled.step(loss) if isinstance(scheduled, lr_scheduler.ReduceLROnPlateau) else scheduled.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), optimizer


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
@pytest.mark.parametrize(("name", "sample"), INPUTS, ids=ids(INPUTS, lambda s: s.desc))
def test_inputs(name, sample, flags):
    ours, _ = train(OURS[name], {**sample.kwargs, **flags})
    theirs, _ = train(PEERS[name], sample.kwargs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours[-1] != ours[0]


@pytest.mark.parametrize(("name", "sample"), INPUTS, ids=ids(INPUTS, lambda s: s.desc))
def test_inputs_in_double(name, sample):
    ours, _ = train(OURS[name], sample.kwargs, torch.float64)
    theirs, _ = train(PEERS[name], sample.kwargs, torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "error"), ERRORS, ids=ids(ERRORS, lambda e: e.optimizer_error_input.desc))
@pytest.mark.parametrize("whose", ["ours", "torch's"])
def test_errors(name, error, whose):
    """Ours and torch's: the same kind of error, with the same words."""
    cls, sample = (OURS if whose == "ours" else PEERS)[name], error.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 2))] if sample.params is None else sample.params
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            cls(params, **sample.kwargs)
        return
    with pytest.raises(error.error_type, match=error.error_regex):
        cls(params, **sample.kwargs)


@pytest.mark.parametrize("name", sorted(INFOS))
def test_schedulers(name):
    """torch's own choice for each optimizer, each alone."""
    for makers in INFOS[name].scheduler_inputs:
        for make in makers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ours, mine = train(OURS[name], {"lr": 0.01}, scheduler=make)
                theirs, torchs = train(PEERS[name], {"lr": 0.01}, scheduler=make)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert mine.param_groups[0]["lr"] == torchs.param_groups[0]["lr"]


@pytest.mark.parametrize("name", sorted(INFOS))
def test_a_tensor_lr_is_what_a_scheduler_writes_into(name):
    ours, mine = train(OURS[name], {"lr": torch.tensor(0.01)}, scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    theirs, _ = train(PEERS[name], {"lr": 0.01}, scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert isinstance(mine.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("name", sorted(INFOS))
def test_default_arguments_are_torchs(name):
    p = nn.Parameter(torch.ones(2))
    mine, torchs = OURS[name]([p]), PEERS[name]([p])
    assert mine.defaults == torchs.defaults
    assert list(mine.param_groups[0]) == list(torchs.param_groups[0])
    assert repr(mine) == repr(torchs)


def test_positional_arguments_are_torchs():
    p = nn.Parameter(torch.ones(2))
    for name, values in {
        "Adam": (0.1, (0.8, 0.9), 1e-4, 0.2, True),
        "AdamW": (0.1, (0.8, 0.9), 1e-4, 0.2, True),
        "SGD": (0.1, 0.9, 0.0, 0.2, True),
        "Adagrad": (0.1, 0.2, 0.3, 0.4, 1e-3, False),
    }.items():
        assert OURS[name]([p], *values).defaults == PEERS[name]([p], *values).defaults


@pytest.mark.parametrize("name", sorted(OURS))
def test_named_parameters(name):
    net = nn.Linear(3, 2)
    optimizer = OURS[name](net.named_parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", sorted(OURS))
def test_compiled_models(name):
    """A compiled forward and backward, and a step that a compiled function calls."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    net = copy.deepcopy(plain)
    compiled = torch.compile(net, backend="aot_eager")
    first, second = OURS[name](plain.parameters(), lr=0.01), OURS[name](net.parameters(), lr=0.01)

    @torch.compile(backend="aot_eager")
    def step():
        second.step()

    for i in range(3):
        x = torch.randn(16, 4)
        for model, optimizer in ((plain, first), (compiled, second)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        first.step()
        step() if i else second.step()
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_adagrads_state_is_there_from_the_beginning():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    mine = OURS["Adagrad"](params, initial_accumulator_value=0.5)
    torchs = PEERS["Adagrad"](params, initial_accumulator_value=0.5)
    for p in params:
        assert torch.equal(mine.state[p]["sum"], torchs.state[p]["sum"])
    mine.share_memory()
    assert mine.state[params[0]]["sum"].is_shared()
    before = mine.state[params[0]]["sum"]
    params[0].grad = torch.ones(3)
    mine.step()
    assert torch.equal(before, torch.full((3,), 1.5))


@pytest.mark.parametrize("loaded", ["nothing kept", "None kept", "kept"])
def test_what_torchs_sgd_writes_loads(loaded):
    """It does not count steps; dampening leaves out the first one all the same."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    mine, torchs = OURS["SGD"](params[:1], **options), PEERS["SGD"](params[1:], **options)
    if loaded != "nothing kept":
        params[1].grad = torch.ones(3)
        torchs.step()
        with torch.no_grad():
            params[0].copy_(params[1])
    state = torchs.state_dict()
    if loaded == "None kept":
        state["state"] = {0: {"momentum_buffer": None}}
        torchs.load_state_dict(copy.deepcopy(state))
        torchs.state.clear()
    mine.load_state_dict(state)
    for g in (2.0, 3.0):
        for p, optimizer in zip(params, (mine, torchs), strict=True):
            p.grad = torch.full((3,), g)
            optimizer.step()
        torch.testing.assert_close(*params)
