"""Who unscales: the step itself or torch's GradScaler before it. Frameworks read it off the optimizer."""

from __future__ import annotations

import pytest
import torch
from cases import NAMES, OURS, TYPICAL
from torch import nn


def flag(optimizer):
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"fused": False}, {"foreach": True}])
def test_it_is_set_where_torchs_is(name, flags):
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = OURS[name](params, **TYPICAL[name], **flags)
    assert flag(optimizer) == bool(flags.get("fused"))
    if hasattr(torch.optim, name):
        assert flag(optimizer) == flag(getattr(torch.optim, name)(params, **flags))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_set_where_grad_scaler_would_refuse(name):
    """fp16 gradients. Those of bf16 it unscales as well as we would, and Lightning clips them then."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = OURS[name](params, **TYPICAL[name])
    assert not flag(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float16))]})
    assert flag(optimizer)


def test_a_wide_parameter_may_have_a_narrow_gradient():
    p = nn.Parameter(torch.ones(3))
    optimizer = OURS["SGD"]([p], lr=0.5)
    p.grad_dtype = None
    p.grad = torch.full((3,), 8.0, dtype=torch.float16)
    assert flag(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(p, torch.full((3,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_overflow_is_skipped_before_the_step(dtype):
    """Where a framework has put its own ``step`` on the optimizer, it sees that none was made."""
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer, calls = OURS["AdamW"]([p]), []
    own = optimizer.step
    optimizer.step = lambda *args: (calls.append(1), own(*args))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for gradient in (1.0, float("nan"), 1.0):
        scaler.scale(torch.ones(()))
        p.grad = torch.full_like(p, gradient)
        scaler.step(optimizer, None)
        scaler.update()
        calls.append(0)
    assert calls == [1, 0, 0, 1, 0]
