"""deepfast.LossScaler where a script had torch's GradScaler."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_scaler import INF, backward, setup

import deepfast


def test_it_is_made_as_grad_scaler_is():
    with pytest.warns(UserWarning, match="CUDA is not available"):
        theirs = torch.amp.GradScaler("cuda")
    with pytest.warns(UserWarning, match="CUDA is not available"):
        ours = deepfast.LossScaler("cuda")
    for scaler in (theirs, ours):
        assert not scaler.is_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disabled = deepfast.LossScaler("cuda", enabled=False)  # use_amp=False on a machine without a GPU
    for scaler in (ours, disabled):
        p, optimizer = setup()
        p.grad = torch.ones_like(p)
        assert scaler.scale(p) is p
        scaler.step(optimizer), scaler.update()
        assert (p != 1).all()
        assert (scaler.get_scale(), scaler.skipped_steps, scaler.state_dict()) == (1.0, 0, {})
    positions = "cpu", 2.0**10, 4.0, 0.25, 7, True
    theirs, ours = torch.amp.GradScaler(*positions), deepfast.LossScaler(*positions)
    assert ours.get_scale() == 2.0**10  # torch says so after its first loss
    theirs.scale(torch.ones(()))
    assert {key: ours.state_dict()[key] for key in theirs.state_dict()} == theirs.state_dict()
    assert not deepfast.LossScaler("cpu", 2.0**10, 4.0, 0.25, 7, False).is_enabled()


@pytest.mark.parametrize("scaler_of", [deepfast.LossScaler, lambda **options: torch.amp.GradScaler("cpu", **options)])
@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_a_very_large_scale_loses_no_gradient_and_does_not_grow_out_of_range(scaler_of, options):
    """The reciprocal of 1e38 is below fp32's normal numbers."""
    p, optimizer = setup(torch.float32, deepfast.SGD, **options)
    optimizer.param_groups[0]["lr"] = 1e36
    scaler = scaler_of(init_scale=1e38, growth_factor=16.0, growth_interval=1)
    for left in (0.9, 0.8):
        backward(scaler, p, 1e-37)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(p.detach(), torch.full((100,), left))
        assert scaler.get_scale() == pytest.approx(1e38)


def test_no_closure_is_none():
    p, optimizer = setup()
    q, foreign = setup(torch.float32, torch.optim.SGD)
    for weight, stepper in ((p, optimizer), (q, foreign)):
        for arguments, named in (((None,), {}), ((), {"closure": None})):
            scaler, before = deepfast.LossScaler(init_scale=8.0), weight.detach().clone()
            backward(scaler, weight)
            scaler.step(stepper, *arguments, **named)
            assert (weight != before).all()
    with pytest.raises(RuntimeError, match="closure"):
        deepfast.LossScaler().step(optimizer, lambda: None)


@pytest.mark.parametrize("cls", [deepfast.SGD, torch.optim.SGD])
def test_bf16_gradients_may_be_unscaled_in_place(cls):
    """Their range is that of fp32."""
    p, optimizer = setup(torch.bfloat16, cls)
    scaler = deepfast.LossScaler(init_scale=2.0**10)
    for gradient in (2.0**-130, INF, 2.0):
        backward(scaler, p, gradient)
        scaler.unscale_(optimizer)
        assert (p.grad == gradient).all()
        scaler.step(optimizer), scaler.update()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.8))
    assert scaler.skipped_steps == 1


def test_gradients_stay_scaled_where_the_step_unscales():
    """What is logged after the step is ``grad_norm``; a foreign optimizer's gradients are unscaled."""
    for cls, expected in ((deepfast.SGD, 24.0), (torch.optim.SGD, 3.0)):
        p, optimizer = setup(torch.float32, cls)
        scaler = deepfast.LossScaler(init_scale=8.0)
        backward(scaler, p, 3.0)
        scaler.step(optimizer)
        assert (p.grad == expected).all()
        assert getattr(optimizer, "grad_norm", 30.0) == 30.0
