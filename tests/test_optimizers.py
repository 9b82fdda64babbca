"""The optimizers against torch's, against the papers' lines, and against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BACKENDS,
    COUNTING,
    DROPINS,
    EVERY,
    HALVES,
    NAMES,
    OURS,
    PEERS,
    REAL_ONLY,
    TYPICAL,
    VARIANTS,
    decided,
    difference,
    give_gradients,
    kept,
    parameters,
    peer_of,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deepfast


# fp64 and complex parameters: the reference takes over by itself.
@pytest.mark.parametrize(
    ("name", "variant", "dtype", "backend"),
    [(*case, torch.float32, backend) for case in EVERY for backend in BACKENDS]
    + [(*case, torch.float64, "auto") for case in EVERY]
    + [(*case, torch.complex64, "auto") for case in EVERY if case[0] not in REAL_ONLY],
)
def test_follows_its_peer(name, variant, dtype, backend):
    """The error against fp64 is at most twice torch's own (Lion, LAMB: that of the paper's lines in torch)."""
    options = {"lr": 1e-2, **VARIANTS[name][variant]}
    ours, theirs, exact = (
        parameters(dtype),
        parameters(dtype),
        parameters(torch.complex128 if dtype.is_complex else torch.float64),
    )
    before = [p.detach().clone() for p in ours]
    mine = OURS[name](ours, backend=backend, **options)
    peer, oracle = peer_of(name, theirs, **options), peer_of(name, exact, **options)
    for i in range(20):
        give_gradients(ours, theirs, exact, seed=i)
        mine.step(), peer.step(), oracle.step()

    def error(params: list[nn.Parameter]) -> float:
        errors = ((p - e).abs() * decided(oracle, e) for p, e in zip(params, exact, strict=True) if p.numel())
        return max(e.max().item() for e in errors)

    assert error(ours) <= 2 * error(theirs) + 1e-14
    assert all((p != b).any() for p, b in zip(ours, before, strict=True) if p.numel())  # a no-op is no step


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_of_zero(name):
    params = parameters()
    before = [p.detach().clone() for p in params]
    give_gradients(params)
    OURS[name](params, lr=0.0, **TYPICAL[name]).step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("master", ["auto", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_good_as_torchs(name, dtype, master, backend):
    ours, theirs, exact = parameters(dtype), parameters(dtype), [nn.Parameter(p.double()) for p in parameters(dtype)]
    options = {"lr": 1e-3, **TYPICAL[name]}
    if "Adam" in name:
        options["eps"] = 1e-3  # torch's own fp16 arithmetic divides by zero with less
    mine = OURS[name](ours, master=master, backend=backend, **options)
    peer, oracle = PEERS[name](theirs, **options), PEERS[name](exact, **options)
    for i in range(30):
        give_gradients(ours, theirs, seed=i)
        for e, p in zip(exact, ours, strict=True):
            e.grad = p.grad.double()
        mine.step(), peer.step(), oracle.step()
    torch_error, our_error = difference(theirs, exact), difference(ours, exact)
    assert our_error <= 2 * torch_error
    if master == "auto":
        masters = [mine.get_master(p) for p in ours]
        pairs = [
            (m.double()[sure], e[sure]) for m, e in zip(masters, exact, strict=True) for sure in [decided(oracle, e)]
        ]
        assert difference(*zip(*pairs, strict=True)) < 1e-5  # what 16 bits show is a rounding of this
        assert our_error <= torch_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("param_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("grad_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", NAMES)
def test_every_mix_of_parameter_and_gradient_dtype(name, param_dtype, grad_dtype, backend):
    p = nn.Parameter(torch.linspace(-2, 2, 5001).to(param_dtype))
    p.grad_dtype = None
    exact = nn.Parameter(p.detach().double())
    options = {"lr": 1e-2, **TYPICAL[name]}
    mine, oracle = OURS[name]([p], backend=backend, **options), PEERS[name]([exact], **options)
    for i in range(5):
        p.grad = torch.sin(torch.arange(5001.0) + i).to(grad_dtype)
        exact.grad = p.grad.double()
        mine.step(), oracle.step()
    assert (kept(mine, p).double() - exact).abs().max() < 1e-5


@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=6),
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
    eps=st.floats(1e-12, 1e-2),
    weight_decay=st.floats(0, 1),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    steps=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_kernel_and_reference_agree(shapes, steps, seed, **options):
    ours, theirs = parameters(shapes=shapes, seed=seed), parameters(shapes=shapes, seed=seed)
    kernel = deepfast.AdamW(ours, backend="cpu", **options)
    oracle = deepfast.AdamW(theirs, backend="reference", **options)
    for i in range(steps):
        give_gradients(ours, theirs, seed=seed + i)
        kernel.step(), oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        # A step moves by about lr; torch's lerp with a small beta is good to some 1e-5 of that.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4 * steps * options["lr"] + 1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(kernel.state[a][name], oracle.state[b][name], rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_options():
    ours, theirs = parameters(), parameters()

    def groups(params):
        return [
            {"params": params[:2], "lr": 1e-1, "weight_decay": 0.5},
            {"params": params[2:4], "betas": (0.1, 0.2), "amsgrad": True},
            {"params": params[4:], "maximize": True, "eps": 1e-2},
        ]

    mine, torchs = deepfast.AdamW(groups(ours)), torch.optim.AdamW(groups(theirs))
    for i in range(5):
        give_gradients(ours, theirs, seed=i)
        mine.step(), torchs.step()
        mine.param_groups[1]["lr"] = torchs.param_groups[1]["lr"] = 0.01 * i
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_counts_its_own_steps(name):
    """One counter for all gives late parameters another's bias correction."""
    ours, theirs = parameters(), parameters()
    mine, torchs = OURS[name](ours, lr=1e-2, **TYPICAL[name]), PEERS[name](theirs, lr=1e-2, **TYPICAL[name])
    for i in range(6):
        give_gradients(ours, theirs, seed=i)
        for params in (ours, theirs):
            for k, p in enumerate(params):
                if i % (k + 1):
                    p.grad = None
        mine.step(), torchs.step()
    assert difference(ours, theirs) < 1e-6
    if name in COUNTING:
        assert [int(mine.state[p]["step"]) for p in ours] == [int(torchs.state[p]["step"]) for p in theirs]


@pytest.mark.parametrize("layout", ["transposed grad", "channels-last param", "channels-last grad", "strided param",
                                    "strided grad", "expanded grad", "transposed param"])  # fmt: skip
@pytest.mark.parametrize("reset_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_any_layout(name, layout, reset_grad, dtype):
    """Torch's fused CPU optimizers walk two layouts as if they were one."""
    kind, which = layout.split()

    def arrange(t: Tensor) -> Tensor:
        if kind == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == "channels-last":
            return t.to(memory_format=torch.channels_last)
        if kind == "expanded":
            return t[:1].expand_as(t)
        padded = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        padded[..., ::2] = t
        return padded[..., ::2]

    torch.manual_seed(0)
    base = torch.randn(6, 5, 4, 3).to(dtype)
    p = nn.Parameter(arrange(base) if which == "param" else base.clone())
    q = nn.Parameter(base.double())
    mine = OURS[name]([p], lr=0.01, reset_grad=reset_grad and kind != "expanded", **TYPICAL[name])
    oracle = PEERS[name]([q], lr=0.01, **TYPICAL[name])
    for _ in range(3):
        grad = torch.randn(6, 5, 4, 3).to(dtype)
        p.grad = arrange(grad) if which == "grad" else grad
        q.grad = p.grad.double().contiguous()
        mine.step(), oracle.step()
        if reset_grad and kind != "expanded":
            assert not p.grad.any()
    assert (kept(mine, p).double() - q).abs().max() < 1e-5
    assert p.stride() == (arrange(base) if which == "param" else base).stride()


def test_tensor_hyperparameters_are_read_at_each_step():
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.1)
    mine = deepfast.AdamW(ours, lr=lr, betas=(torch.tensor(0.9), torch.tensor(0.99)))
    torchs = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99))
    for i in range(4):
        give_gradients(ours, theirs, seed=i)
        mine.step(), torchs.step()
        lr.mul_(0.5)
        torchs.param_groups[0]["lr"] *= 0.5
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", DROPINS)
def test_closure_scheduler_hooks_and_late_groups(name):
    ours, theirs = parameters(), parameters()
    seen = []
    results = []
    for params, cls in ((ours, OURS[name]), (theirs, PEERS[name])):
        optimizer = cls(params[:3], lr=1e-2, **TYPICAL[name])
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
        for i in range(5):

            def closure(params=params, i=i):
                assert torch.is_grad_enabled()
                give_gradients(params, seed=i)
                return i * 2.0

            results.append(optimizer.step(closure))
            scheduler.step()
            if i == 1:
                optimizer.add_param_group({"params": params[3:], "lr": 0.5})
                if cls is torch.optim.Adagrad:  # in torch 2.10 and 2.11 it forgets a late group's state
                    for p in params[3:]:
                        optimizer.state[p].setdefault("step", torch.zeros(()))
                        optimizer.state[p].setdefault("sum", torch.full_like(p, 0.1))
    assert len(seen) == 10
    assert results == [0.0, 2.0, 4.0, 6.0, 8.0] * 2
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_autograd_sees_what_the_step_has_written(name, backend):
    w, x = nn.Parameter(torch.randn(4)), torch.ones(4, requires_grad=True)
    y = (w * x).sum()
    w.grad = torch.ones(4)
    OURS[name]([w], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_amsgrad_may_be_turned_on_later(amsgrad):
    params = parameters()
    optimizer = trained(deepfast.AdamW, params)
    optimizer.param_groups[0]["amsgrad"] = True
    give_gradients(params)
    optimizer.step()
    assert (optimizer.state[params[0]]["max_exp_avg_sq"] > 0).any()


def test_steady_gradients_average_to_themselves():
    """fp32 beta and fp32 1 - beta do not add up to 1."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = deepfast.AdamW([p], betas=(0.9, 0.99))
    for _ in range(3000):
        p.grad = torch.full((1,), 3.0)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([3.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.tensor([9.0]), rtol=4e-6, atol=0)
