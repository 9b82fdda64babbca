"""A scaler is given what frameworks make of an optimizer: wrappers, copies, subclasses with a step of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import NAMES, OURS, TYPICAL
from torch import nn

import deepfast
from deepfast.errors import ConfigError

SCALERS = {
    "torch's": lambda: torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2),
    "ours": lambda: deepfast.LossScaler(init_scale=1024.0, growth_interval=2),
}
KINDS = {"fp32": {}, "fused": {"fused": True}, "fp16": {}}
with_scalers = pytest.mark.parametrize("scaler", SCALERS)


class OfItsClass:
    """Makes its class from the optimizer's, so that isinstance holds, as Lightning and Fabric do."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class WithItsAttributes(OfItsClass):
    def __init__(self, optimizer):
        self.__dict__.update(optimizer.__dict__)
        super().__init__(optimizer)


class Another(OfItsClass):
    """Around the first one."""


class Forwarding:
    """Any class, and reads whatever it has not from the optimizer."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Holding(torch.optim.Optimizer):
    """torch's class, and a few attributes that it passes on, as accelerate does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        if name in ("param_groups", "state", "defaults", "zero_grad"):
            return getattr(self.optimizer, name)
        raise AttributeError(name)

    def step(self, closure=None):
        return self.optimizer.step(closure)


WRAPPERS = {
    "its class": OfItsClass,
    "its class and attributes": WithItsAttributes,
    "twice": lambda optimizer: Another(OfItsClass(optimizer)),
    "forwarding": Forwarding,
    "holding": Holding,
}


def make(name, kind, **options):
    p = nn.Parameter(torch.linspace(0.5, 1.5, 50, dtype=torch.float16 if kind == "fp16" else torch.float32))
    return p, OURS[name]([p], **{"lr": 0.1, **TYPICAL[name], **KINDS[kind], **options})


def steps(scaler, p, optimizer, gradients=(0.5, float("inf"), 0.25, -0.5)):
    """What the parameter and the scale are after each."""
    trace = []
    for gradient in gradients:
        scaled = scaler.scale(torch.ones(()))
        p.grad = torch.full_like(p, gradient * float(scaled))
        scaler.step(optimizer)
        scaler.update()
        trace.append((p.detach().clone(), scaler.get_scale()))
    return trace


@with_scalers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_steps_as_its_optimizer(name, wrapper, kind, scaler):
    p, bare = make(name, kind)
    q, inner = make(name, kind)
    wrapped = WRAPPERS[wrapper](inner)
    expected = steps(SCALERS[scaler](), p, bare)
    assert torch.equal(expected[0][0], expected[1][0])  # the overflow is skipped
    assert [scale for _, scale in expected] == [1024, 512, 512, 1024]
    if kind == "fp16" and wrapper in ("forwarding", "holding"):
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)fp16 gradients"):
            steps(SCALERS[scaler](), q, wrapped)
        return
    for (weight, scale), (other, same) in zip(expected, steps(SCALERS[scaler](), q, wrapped), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=0)
        assert scale == same


@with_scalers
@pytest.mark.parametrize("wrapper", ["its class", "its class and attributes", "twice", "forwarding"])
def test_what_a_step_has_found_is_read_through_a_wrapper(wrapper, scaler):
    p, inner = make("AdamW", "fp32", max_grad_norm=1.0)
    wrapped = WRAPPERS[wrapper](inner)
    assert wrapped.grad_norm is None
    steps(SCALERS[scaler](), p, wrapped, (2.0,))
    assert wrapped.grad_norm is inner.grad_norm
    assert wrapped.grad_norm == pytest.approx(2.0 * 50**0.5)


@with_scalers
def test_a_wrapper_and_its_optimizer_are_one(scaler):
    p, inner = make("SGD", "fp32", lr=0.25, momentum=0.0)
    wrapped, scaler = OfItsClass(inner), SCALERS[scaler]()
    p.grad = torch.full_like(p, float(scaler.scale(torch.ones(()))))
    before = p.detach().clone()
    scaler.unscale_(wrapped)
    if isinstance(scaler, deepfast.LossScaler):  # GradScaler goes by identity
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(inner)
    scaler.step(wrapped)
    torch.testing.assert_close(p.detach(), before - 0.25)
    assert not hasattr(wrapped, "grad_scale")
    assert not hasattr(inner, "found_inf")


@with_scalers
@pytest.mark.parametrize("kind", ["fused", "fp16"])
def test_a_step_that_did_not_see_the_scale_is_noticed(kind, scaler):
    class Own(deepfast.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(group["lr"] * p.grad)

    p = nn.Parameter(torch.ones(3, dtype=torch.float16 if kind == "fp16" else torch.float32))
    optimizer = Own([p], lr=0.1, **KINDS[kind])
    with pytest.raises(RuntimeError, match=r"Own\.step\(\) has not called the deepfast optimizer's"):
        steps(SCALERS[scaler](), p, optimizer, (1.0,))


@with_scalers
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_what_the_optimizer_has_and_shares_nothing(name, twin, scaler):
    p, optimizer = make(name, "fp16", max_grad_norm=1.0)
    steps(SCALERS[scaler](), p, optimizer, (1.0,))
    other = twin(optimizer)
    public = [{key for key in vars(o) if not key.startswith("_")} for o in (optimizer, other)]
    assert public[0] == public[1]
    assert other.grad_norm is None
    assert other._step_supports_amp_scaling
    q = other.param_groups[0]["params"][0]
    norm = optimizer.grad_norm
    steps(SCALERS[scaler](), q, other, (3.0,))
    assert optimizer.grad_norm is norm
    assert other.grad_norm == pytest.approx(3.0 * 50**0.5)


def test_the_engine_takes_no_wrapper():
    """It would clip nothing: what it sets stays on the wrapper."""
    net = nn.Linear(3, 2)
    wrapped = OfItsClass(deepfast.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="the optimizer itself, not a wrapper"):
        deepfast.initialize(model=net, optimizer=wrapped, config={"train_batch_size": 1, "gradient_clipping": 0.1})
