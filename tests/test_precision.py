"""In what type a forward pass computes, what of its inputs is cast, and activations that are computed again."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from engines import CONFIG, model
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepfast

HALF = {"bf16": {"bf16": True}, "fp16": {"fp16": {"enabled": True, "loss_scale": 8.0}}}
ONE = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
mse = nn.functional.mse_loss


def engine(module, **config):
    return deepfast.initialize(model=module, config={**CONFIG, **ONE, **config})[0]


class Regression(nn.Module):
    """Computes its loss inside forward, as Hugging Face models do; labels, positions and a mask are floats."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels, mask=None):
        self.seen = labels, mask
        return (self.layer(x).float().squeeze(-1) * 0 + labels).mean()


@pytest.mark.parametrize("kind", HALF)
def test_labels_are_not_rounded(kind):
    labels, mask = torch.tensor([1000.3, 70001.0]), torch.tensor([-1e9])
    module = Regression()
    e = engine(module, **HALF[kind])
    e.backward(e(torch.ones(2, 4), labels=labels, mask=mask))
    assert module.seen == (labels, mask)
    e.step()


@pytest.mark.parametrize("auto_cast", [False, True])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_cast(auto_cast, given):
    """All inputs, or only what a layer is given, whatever type a script has cast its inputs to."""
    module = Regression()
    e = engine(module, fp16={"enabled": True, "loss_scale": 8.0, "auto_cast": auto_cast})
    labels = torch.ones(2, dtype=torch.float64)
    e.backward(e(torch.ones(2, 4, dtype=given), labels))
    assert module.seen[0].dtype == (torch.float32 if auto_cast else torch.float64)  # fp16 computes in fp32 on a CPU
    assert module.layer.weight.dtype == torch.float16
    e.step()
    assert e.was_step_applied()


def test_a_section_that_is_off_decides_nothing():
    e = engine(model(), fp16={"enabled": False, "auto_cast": False}, bf16={"enabled": True})
    assert e(torch.ones(2, 6)).dtype == torch.bfloat16
    module = Regression()
    e = engine(module, fp16={"enabled": False, "auto_cast": True}, bf16={"enabled": True})
    e(torch.ones(2, 4), torch.ones(2))
    assert module.seen[0].dtype == torch.float32


Point = namedtuple("Point", "x")


@pytest.mark.parametrize("auto_cast", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: {"x": x, "n": None}, Point, lambda x: UserDict(x=x), lambda x: [x, 3]])
def test_inputs_in_whatever_holds_them(wrap, auto_cast):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, batch):
            self.kind = type(batch)
            return self.layer(batch[0] if isinstance(batch, (tuple, list)) else batch["x"])

    module = Holding()
    batch = wrap(torch.ones(2, 4, dtype=torch.float64))
    engine(module, fp16={"enabled": True, "auto_cast": auto_cast})(batch)
    assert module.kind is type(batch)


class Loose(nn.Module):
    """Weights that no layer of torch.nn holds."""

    def __init__(self, listed):
        super().__init__()
        weight = nn.Parameter(torch.ones(6, 3))
        self.weights = nn.ParameterList([weight]) if listed else weight
        self.listed = listed

    def forward(self, x):
        return x @ (self.weights[0] if self.listed else self.weights)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.head = nn.LSTM(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0])


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("module", [Loose(True), Loose(False), nn.Linear(6, 3), Recurrent(), nn.Conv1d(2, 3, 1)])
def test_whatever_holds_weights_gets_inputs_that_fit(module, kind):
    e = engine(module, **HALF[kind])
    out = e(torch.ones(2, 6))
    e.backward(out.float().square().mean())
    e.step()
    assert e.was_step_applied()


def test_a_second_engine_adds_no_second_hooks():
    module = nn.Linear(6, 3)
    counts = []
    for _ in range(3):
        engine(module, fp16={"enabled": True})
        counts.append((len(module._forward_pre_hooks), len(module._forward_hooks)))
    assert counts == [counts[0]] * 3


class Again(nn.Module):
    """Activations that are computed again in the backward pass."""

    def __init__(self, reentrant, recurrent=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LSTM(6, 6) if recurrent else nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.reentrant, self.recurrent = reentrant, recurrent

    def inner(self, x):
        return torch.tanh(self.first(x)[0] if self.recurrent else self.first(x))

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["fp32", *HALF])
def test_activations_can_be_computed_again(kind, reentrant, recurrent):
    """Under fp16 on a CPU, too, where they are computed with fp32 copies of the weights."""
    config = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0, **HALF.get(kind, {})}
    module, plain = Again(reentrant, recurrent), Again(reentrant, recurrent)
    e = engine(module, **config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        p.data = q.data.float()
    g = torch.Generator().manual_seed(1)
    for _ in range(2):
        x, y = torch.randn(2, 6, generator=g), torch.randn(2, 3, generator=g)
        x.requires_grad_(reentrant)
        (mse(plain(x), y) / 2).backward()
        e.backward(mse(e(x).float(), y))
        e.step()
    optimizer.step()
    assert e.was_step_applied()
    tolerance = 1e-5 if kind == "fp32" else 2e-2
    if recurrent:  # and none of the copies is left
        assert all(a is b for a, b in zip(module.first._flat_weights, module.first.parameters(), strict=True))
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert p.dtype == e.dtype
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance)


def test_a_layer_called_by_itself_computes_in_fp32_too():
    e = engine(model(), fp16={"enabled": True})
    out = e.module[0](torch.ones(2, 6, dtype=torch.float16))
    assert out.dtype == torch.float32
    assert e.module[0].weight.dtype == torch.float16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        e.module[0](torch.ones(2, 5))
    assert e.module[0].weight.dtype == torch.float16
