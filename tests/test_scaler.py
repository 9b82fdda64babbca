"""deepfast.LossScaler: its table, its place beside torch's GradScaler, and the faults that others have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepfast
from deepfast import reference

INF = float("inf")


def setup(dtype=torch.float16, cls=None, **options):
    p = nn.Parameter(torch.ones(100, dtype=dtype))
    optimizer = (cls or deepfast.AdamW)([p], lr=0.1, **options)
    return p, optimizer


def backward(scaler, p, gradient=1.0):
    """As a backward pass would: d(scale * gradient * sum(p)) / dp."""
    scaled = scaler.scale(torch.ones(()))
    p.grad = (torch.full(p.shape, gradient) * scaled).to(p.dtype)


def iterate(scaler, p, optimizer, overflow):
    backward(scaler, p, INF if overflow else 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(
    ("options", "overflows", "scales", "trackers"),
    [
        # clean steps grow, and start counting anew
        ({"growth_interval": 3}, "....", [64, 64, 128, 128], [1, 2, 0, 1]),
        # every overflow backs off and zeroes the tracker
        ({"growth_interval": 3}, "..x...", [64, 64, 32, 32, 32, 64], [1, 2, 0, 1, 2, 0]),
        # hysteresis forgives, then every further overflow backs off
        ({"hysteresis": 3, "growth_interval": 9}, "x.x.x.x", [64, 64, 64, 64, 32, 32, 16], [0, 1, 0, 1, 0, 1, 0]),
        # growth refills it
        ({"hysteresis": 2, "growth_interval": 2}, "x..xx", [64, 64, 128, 128, 64], [0, 1, 0, 0, 0]),
        # consecutive: any clean step does
        ({"hysteresis": 2, "consecutive_hysteresis": True, "growth_interval": 9}, "x.x.xx", [64, 64, 64, 64, 64, 32],
         [0, 1, 0, 1, 0, 0]),
        # bounds
        ({"min_scale": 32.0, "growth_interval": 9}, "xxx", [32, 32, 32], [0, 0, 0]),
        ({"max_scale": 100.0, "growth_interval": 1}, "..", [100, 100], [0, 0]),
        # static
        ({"dynamic": False}, "x.x", [64, 64, 64], [0, 0, 0]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_transition_table(options, overflows, scales, trackers, backend, monkeypatch):
    monkeypatch.setenv("DEEPFAST_BACKEND", backend)
    p, optimizer = setup(torch.float32)
    scaler = deepfast.LossScaler(init_scale=64.0, **options)
    seen = []
    for mark in overflows:
        iterate(scaler, p, optimizer, mark == "x")
        seen.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))
    assert seen == list(zip(scales, trackers, strict=True))
    assert scaler.skipped_steps == overflows.count("x")
    assert int(optimizer.state[p]["step"]) == overflows.count(".")


@given(
    st.lists(st.booleans(), max_size=40),
    st.fixed_dictionaries(
        {
            "growth_factor": st.floats(1.1, 8),
            "backoff_factor": st.floats(0.1, 0.9),
            "growth_interval": st.integers(1, 5),
            "hysteresis": st.integers(1, 4),
            "consecutive_hysteresis": st.booleans(),
            "dynamic": st.booleans(),
            "min_scale": st.floats(0.5, 4),
            "max_scale": st.floats(2**10, 2**14),
        }
    ),
)
@settings(deadline=None, max_examples=100)
def test_kernel_and_reference_make_the_same_transitions(overflows, options):
    a = torch.tensor([64.0, 0.0, float(options["hysteresis"]), 0.0])
    b = a.clone()
    for overflow in overflows:
        found = [torch.zeros(()), torch.tensor(2.0 if overflow else 0.0)]
        torch.ops.deepfast.scaler_update_(a, found, **options)
        reference.scaler_update_(b, found, **options)
        assert torch.equal(a, b)


@pytest.mark.parametrize("overflows", [[0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0]])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_a_foreign_optimizer_steps_as_with_torchs_scaler(overflows, cls):
    runs = []
    for scaler in (
        deepfast.LossScaler(init_scale=64.0, growth_interval=2),
        torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2),
    ):
        p, optimizer = setup(torch.float32, cls)
        scales = []
        for overflow in overflows:
            iterate(scaler, p, optimizer, overflow)
            scales.append(scaler.get_scale())
        runs.append((scales, p.detach().clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_a_step_without_a_scaler_and_with_one_are_the_same():
    plain, a = setup(master="fp32")
    scaled, b = setup(master="fp32")
    scaler = deepfast.LossScaler(init_scale=2.0**10)
    for _ in range(5):
        plain.grad = torch.full_like(plain, 0.25)
        a.step()
        backward(scaler, scaled, 0.25)
        scaler.step(b), scaler.update()
    assert torch.equal(plain, scaled)
    assert torch.equal(a.state[plain]["exp_avg_sq"], b.state[scaled]["exp_avg_sq"])
    assert b.grad_norm == 2.5  # unscaled
    assert not hasattr(b, "grad_scale")
    assert not b._check_finite


def test_200_overflows_stop_at_the_floor():
    """Without one the scale reaches 0 and the next finite step writes NaN."""
    p, optimizer = setup()
    scaler = deepfast.LossScaler()
    for _ in range(200):
        iterate(scaler, p, optimizer, overflow=True)
    assert scaler.get_scale() == 1.0
    assert scaler.skipped_steps == 200
    assert (p == 1).all()
    iterate(scaler, p, optimizer, overflow=False)
    assert p.isfinite().all()
    assert (p != 1).all()


@pytest.mark.parametrize("cls", [deepfast.AdamW, torch.optim.SGD])
def test_a_step_is_unscaled_with_the_scale_its_backward_used(cls):
    """A scale that is moved between backward and step must not reach the gradients."""
    p, optimizer = setup(torch.float32, cls)
    q, other = setup(torch.float32, cls)
    scaler, constant = deepfast.LossScaler(init_scale=8.0), deepfast.LossScaler(init_scale=8.0)
    backward(scaler, p), backward(constant, q)
    scaler.update(1024.0)
    scaler.step(optimizer), constant.step(other)
    assert torch.equal(p, q)


def test_a_growth_step_uses_the_old_scale():
    p, optimizer = setup(torch.float32, torch.optim.SGD)
    scaler = deepfast.LossScaler(init_scale=8.0, growth_interval=1)
    for _ in range(3):
        iterate(scaler, p, optimizer, overflow=False)
    torch.testing.assert_close(p.detach(), torch.full((100,), 0.7))
    assert scaler.get_scale() == 64.0


def test_several_optimizers_skip_for_themselves_and_update_once():
    p, a = setup()
    q, b = setup()
    scaler = deepfast.LossScaler(init_scale=16.0, growth_interval=2)
    backward(scaler, p, INF), backward(scaler, q)
    scaler.step(a), scaler.step(b)
    assert scaler.found_inf(a) == 1
    assert scaler.found_inf(b) == 0
    scaler.update()
    assert (p == 1).all()
    assert (q != 1).all()
    assert (scaler.get_scale(), scaler.skipped_steps) == (8.0, 1)


def test_static_scale_below_one():
    p, optimizer = setup()
    scaler = deepfast.LossScaler(init_scale=0.5, dynamic=False)
    for overflow in (False, True, False):
        iterate(scaler, p, optimizer, overflow)
    assert (scaler.get_scale(), scaler.skipped_steps) == (0.5, 1)


def test_disabled_passes_through():
    p, optimizer = setup()
    scaler = deepfast.LossScaler(enabled=False)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    p.grad = torch.ones_like(p)
    scaler.step(optimizer)
    scaler.update()
    assert (p != 1).all()
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    assert not scaler.is_enabled()


def test_unscale_then_step():
    for cls in (deepfast.AdamW, torch.optim.SGD):
        p, optimizer = setup(torch.float32, cls)
        q, other = setup(torch.float32, cls)
        scaler = deepfast.LossScaler(init_scale=8.0)
        for gradient in (3.0, INF, 2.0):
            backward(scaler, p, gradient)
            scaler.unscale_(optimizer)
            if gradient != INF:
                assert (p.grad == gradient).all()
                q.grad = torch.full_like(q, gradient)
                other.step()
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(p, q)
        assert scaler.skipped_steps == 1


@pytest.mark.parametrize("cls", [deepfast.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_step_that_raised_can_be_tried_again(cls, unscale_first):
    p, optimizer = setup(torch.float32, cls)
    q, other = setup(torch.float32, cls)
    scaler = deepfast.LossScaler(init_scale=8.0)
    backward(scaler, p, 3.0)
    q.grad = torch.full_like(q, 3.0)
    if unscale_first:
        scaler.unscale_(optimizer)
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scaler.step(optimizer)
    hook.remove()
    scaler.step(optimizer), other.step()
    scaler.update()
    assert torch.equal(p, q)


def test_a_foreign_optimizer_of_16_bit_parameters_is_refused():
    p, optimizer = setup(torch.float16, torch.optim.SGD)
    scaler = deepfast.LossScaler()
    backward(scaler, p)
    with pytest.raises(RuntimeError, match="underflow"):
        scaler.step(optimizer)


def test_sparse_gradients_of_a_foreign_optimizer():
    layer = nn.Embedding(10, 3, sparse=True)
    before = layer.weight.detach().clone()
    scaler = deepfast.LossScaler(init_scale=8.0)
    scaler.scale(layer(torch.tensor([4])).sum()).backward()
    scaler.step(torch.optim.SGD(layer.parameters(), lr=1.0))
    torch.testing.assert_close(before[4] - layer.weight[4].detach(), torch.ones(3))


def test_an_overflow_never_raises_the_scale():
    p, optimizer = setup()
    scaler = deepfast.LossScaler()
    scaler.load_state_dict({**scaler.state_dict(), "scale": 0.25})
    iterate(scaler, p, optimizer, overflow=True)
    assert scaler.get_scale() == 0.25
    for bad in (0.0, -1.0, INF):
        with pytest.raises(ValueError, match="positive and finite"):
            scaler.update(bad)


def test_unscaling_16_bit_gradients_names_the_way_out():
    p, optimizer = setup()
    scaler = deepfast.LossScaler()
    backward(scaler, p)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        scaler.unscale_(optimizer)


def test_clipping_inside_a_scaled_step():
    p, optimizer = setup(max_grad_norm=1.0)
    q, other = setup(max_grad_norm=1.0)
    scaler = deepfast.LossScaler(init_scale=2.0**8)
    backward(scaler, p, 4.0)
    scaler.step(optimizer)
    q.grad = torch.full_like(q, 4.0)
    other.step()
    assert optimizer.grad_norm == other.grad_norm == 40.0
    assert torch.equal(p, q)


def test_order_of_calls_is_checked():
    p, optimizer = setup(torch.float32)
    scaler = deepfast.LossScaler()
    with pytest.raises(RuntimeError, match="No inf checks"):
        scaler.update()
    with pytest.raises(RuntimeError, match="none of its parameters has a gradient"):
        scaler.step(optimizer)
    backward(scaler, p)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        deepfast.LossScaler().step(optimizer, closure=lambda: None)


def test_scale_takes_what_grad_scaler_takes():
    scaler = deepfast.LossScaler(init_scale=4.0)
    one = torch.ones(2)
    assert torch.equal(scaler.scale(one), one * 4)
    a, (b, c) = scaler.scale([one, (one, one * 2)])
    assert torch.equal(a, b)
    assert torch.equal(c, one * 8)
    assert [float(t) for t in scaler.scale(t for t in (torch.ones(()),))] == [4.0]
    with pytest.raises(ValueError, match="tensor"):
        scaler.scale(3)


def test_state_travels():
    p, optimizer = setup()
    scaler = deepfast.LossScaler(init_scale=64.0, hysteresis=2, growth_interval=5)
    for overflow in (False, True, False):
        iterate(scaler, p, optimizer, overflow)
    other = deepfast.LossScaler(hysteresis=2)
    other.load_state_dict(scaler.state_dict())
    for twin in (other, copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):  # noqa: S301
        assert twin.state_dict() == scaler.state_dict()
        assert twin.get_growth_interval() == 5
        iterate(twin, p, optimizer, overflow=True)
        assert twin.get_scale() == 32.0


def test_grad_scalers_state_loads():
    theirs = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=7)
    theirs.scale(torch.ones(()))
    ours = deepfast.LossScaler(hysteresis=3)
    ours.load_state_dict(theirs.state_dict())
    assert ours.get_scale() == 256.0
    assert ours.state_dict()["hysteresis_left"] == 3
    assert {k: ours.state_dict()[k] for k in theirs.state_dict()} == theirs.state_dict()
    with pytest.raises(RuntimeError, match="empty"):
        ours.load_state_dict({})


@pytest.mark.parametrize(
    "options",
    [
        {"init_scale": 0.0},
        {"init_scale": -1.0, "dynamic": False},
        {"init_scale": INF, "dynamic": False},
        {"init_scale": 0.5},
        {"init_scale": 2.0**30, "max_scale": 2.0**24},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"hysteresis": 0},
        {"min_scale": 0.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        deepfast.LossScaler(**options)


def test_a_scale_that_is_set_after_the_step_is_the_next_ones():
    p, optimizer = setup(torch.float32, torch.optim.SGD)
    scaler = deepfast.LossScaler(init_scale=8.0)
    backward(scaler, p)
    scaler.step(optimizer)
    scaler.update(new_scale=2.0)
    p.grad = torch.full_like(p, 2.0)  # scaled by hand, with get_scale()
    before = p.detach().clone()
    scaler.step(optimizer)
    torch.testing.assert_close(before - p, torch.full_like(p, optimizer.param_groups[0]["lr"]))
