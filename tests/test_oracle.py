"""The vectorized kernels against the same formulas compiled for one element at a time: equal to the last bit."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch
from cases import EVERY, OURS, VARIANTS
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepfast import build, ops, reference
from deepfast.optimizers import OPTIMIZERS

SCALAR = ("-std=c++20", "-O1", "-fno-tree-vectorize", "-ffp-contract=off", "-shared", "-fPIC")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    library = tmp_path_factory.mktemp("oracle") / "oracle.so"
    cxx = build.compiler()
    assert cxx is not None
    subprocess.run([*cxx.command, *SCALAR, "-o", str(library), str(ROOT / "tests/oracle.cpp")], check=True)
    function = ctypes.CDLL(str(library)).oracle_step
    function.argtypes = [ctypes.c_char_p, ctypes.c_int64, *[ctypes.c_void_p] * 7, ctypes.c_float, ctypes.c_void_p]
    return function


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def oracle_step(function, optimizer, hyper: Tensor, p: nn.Parameter, state: dict[str, Tensor], norms: Tensor | None):
    """One scalar step over copies of ``p`` and its state; returns them."""
    group = optimizer.param_groups[0]
    new = {k: v.clone() for k, v in state.items()}
    weight, grad = p.detach().clone(), p.grad.clone()
    moments = [new[name] for name in optimizer._moments(group)]
    moments += [None] * (3 - len(moments))
    known = function(
        optimizer._rule(group).encode(),
        p.numel(),
        pointer(weight),
        pointer(grad),
        *map(pointer, moments),
        pointer(new.get("step")),
        hyper.data_ptr() + 8,
        float(hyper[0, 0]),
        pointer(norms),
    )
    assert known
    return weight, new


def bits(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).view(torch.int32)


numbers = st.floats(-6, 6)  # decimal exponents of gradients and parameters
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple) | st.integers(1000, 5000).map(lambda n: (n,))


@given(
    case=st.sampled_from(EVERY),
    shapes=st.lists(shapes, min_size=1, max_size=4),
    hyper=st.fixed_dictionaries(
        {"lr": st.floats(0, 1), "weight_decay": st.sampled_from([0.0, 0.1]) | st.floats(0, 1)},
        optional={"maximize": st.booleans()},
    ),
    betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
    eps=st.floats(1e-12, 1e-2),
    sizes=st.tuples(numbers, numbers),
    steps=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_bitwise_equal(oracle, case, shapes, hyper, betas, eps, sizes, steps, seed):
    name, variant = case
    options = {**VARIANTS[name][variant], **hyper}
    if "betas" in OPTIMIZERS[name].split():
        options["betas"] = betas
    if "eps" in OPTIMIZERS[name].split():
        options["eps"] = eps
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=g) * 10.0 ** sizes[0]) for s in shapes]
    optimizer = OURS[name](params, backend="cpu", **options)
    optimizer.init_state()
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g) * 10.0 ** sizes[1]
        before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}) for p in params]
        optimizer.step()
        table = optimizer._hyper_table(torch.device("cpu"))[0]
        for p, (old, state) in zip(params, before, strict=True):
            new = p.detach().clone()
            with torch.no_grad():
                p.copy_(old)
            weight, expected = oracle_step(oracle, optimizer, table, p, state, norms_of(optimizer, table, p, state))
            with torch.no_grad():
                p.copy_(new)
            assert torch.equal(bits(new), bits(weight)), (name, variant)
            for key, value in expected.items():
                assert torch.equal(bits(optimizer.state[p][key]), bits(value)), (name, variant, key)


def norms_of(optimizer, hyper: Tensor, p: nn.Parameter, state: dict[str, Tensor]) -> Tensor | None:
    """LAMB's two sums: the kernel's own (their order is its own; elsewhere they are compared with fp64)."""
    group = optimizer.param_groups[0]
    rule = optimizer._rule(group)
    if reference.RULES[rule].adapt is None:
        return None
    moments = [state[name].clone() for name in optimizer._moments(group)]  # a plan keeps no state alive
    steps, params = [state["step"].clone()], [p.detach().clone()]  # nor a parameter
    plan = ops.native.Plan(
        rule,
        params,
        [torch.empty(0)],
        moments,
        steps,
        torch.zeros(1, dtype=torch.int32),
    )
    assert plan.gather([p.grad], False) == 1
    return plan.norms(hyper, [], torch.tensor([1.0, 0.0, 0.0]))
