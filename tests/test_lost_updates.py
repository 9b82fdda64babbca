"""16-bit weights without an fp32 master, and a learning rate at which most updates round away: it is said once."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import NAMES, OURS
from torch import nn

import deepfast
from deepfast.optim.lost import STEP

TINY, ENOUGH = 1e-6, 0.05


def said(step, steps=3 * STEP):
    """The warnings about it, and after which step."""
    found = []
    for i in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        lost = [w for w in caught if "rounded away" in str(w.message)]
        found += [(i, str(w.message)) for w in lost]
        assert all(w.filename == __file__ for w in lost)  # where step() is called
    return found


def stepping(cls, lr, dtype=torch.bfloat16, gradient=1.0, shape=(70, 90), **options):
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = cls([p], lr=lr, **options)

    def step():
        p.grad = torch.full_like(p, gradient)
        optimizer.step()

    return step


@pytest.mark.parametrize("shape", [(70, 90), (9000,), (), (3, 0), (2, 9000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_most_are_lost(name, dtype, shape):
    found = said(stepping(OURS[name], TINY, dtype, shape=shape, master="none"))
    assert [step for step, _ in found] == ([STEP] if 0 not in shape else [])
    for _, message in found:
        assert "100% of the updates" in message
        assert "lr=1e-06" in message
        assert "master='none'" in message


@pytest.mark.parametrize(
    ("lr", "options"),
    [
        (ENOUGH, {"master": "none"}),
        (TINY, {}),  # masters
        (TINY, {"master": "none", "dtype": torch.float32}),
        (0.0, {"master": "none"}),  # frozen, or before a warm-up
        (TINY, {"master": "none", "gradient": 0.0}),  # rows that a batch did not meet
    ],
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_nothing_is_lost(name, lr, options):
    assert said(stepping(OURS[name], lr, **options)) == []


@pytest.mark.parametrize(("large", "message"), [(1, None), (3, "75% of the updates")])
def test_the_share_is_counted(large, message):
    """An update that is lost in a weight of 1 moves one of 1/64."""
    p = nn.Parameter(torch.tensor([1.0] * large + [1 / 64] * (4 - large), dtype=torch.bfloat16).repeat(1000))
    optimizer = deepfast.SGD([p], lr=2.0**-10, master="none")

    def step():
        p.grad = torch.ones_like(p)
        optimizer.step()

    found = said(step, STEP)
    assert len(found) == (message is not None)
    assert all(message in text for _, text in found)


@pytest.mark.parametrize("lr", [TINY, ENOUGH])
def test_a_skipped_step_is_not_looked_at(lr):
    p = nn.Parameter(torch.ones(100, dtype=torch.float16))
    optimizer, scaler, count = deepfast.SGD([p], lr=lr, master="none"), deepfast.LossScaler(init_scale=8.0), []

    def step():
        count.append(1)
        scaler.scale(p.float().sum()).backward()
        if len(count) in (STEP, STEP + 1):
            p.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert [i for i, _ in said(step)] == ([STEP + 2] if lr == TINY else [])


@pytest.mark.parametrize("lr", [TINY / 100, ENOUGH])
@pytest.mark.parametrize("section", ["bf16", "fp16"])
def test_torchs_optimizer_in_the_engine(section, lr):
    torch.manual_seed(0)
    net = nn.Linear(30, 20)
    engine = deepfast.initialize(
        model=net,
        optimizer=torch.optim.RMSprop(net.parameters(), lr=lr, eps=1e-3),
        config={"train_batch_size": 4, "gradient_clipping": 0, section: {"enabled": True}},
    )[0]
    dtype = next(net.parameters()).dtype

    def step():
        engine.backward(engine(torch.randn(4, 30).to(dtype)).float().square().mean())
        engine.step()

    found = said(step)
    assert len(found) == (lr != ENOUGH)
    assert all("a deepfast optimizer" in text for _, text in found)
