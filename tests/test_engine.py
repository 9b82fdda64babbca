"""The engine: one step's arithmetic, in every precision and over ranks."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from conftest import run
from engines import CONFIG, batches, engine, equal, model, state, train
from torch import nn

import deepfast
from deepfast.engine import config as configuration
from deepfast.engine import schedule
from deepfast.engine.by_hand import safe_get_full_grad


def test_accumulation_is_the_mean_of_the_micro_batches():
    e, plain = engine(), model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for start in (0, 4, 8):
        data = batches(12)[start : start + 4]
        train(e, data)
        optimizer.zero_grad()
        x, y = (torch.cat(t) for t in zip(*data, strict=True))
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        assert e.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(e.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert (e.global_steps, e.micro_steps) == (3, 12)
    assert all(p.grad is None for p in e.module.parameters())


def test_weights_are_normalized_over_the_step():
    """Ragged micro-batches: weighted by their sizes, the mean over all samples."""
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(4, size=5), (5, 1, 3, 2), strict=True)]
    e, plain = engine(), model()
    train(e, data, weights=[5, 1.0, torch.tensor(3.0), 2])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    nn.functional.mse_loss(plain(x), y).backward()
    optimizer.step()
    for p, q in zip(e.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    e.backward(e(x).sum(), 1.0)
    with pytest.raises(RuntimeError, match="a weight, or none"):
        e.backward(e(x).sum())


def test_16_bit_gradients_are_summed_in_fp32():
    """1 + 3 * 2^-11 in fp16 steps would stay 1."""
    config = {"bf16": True, "train_batch_size": 4, "gradient_accumulation_steps": 4}
    p = nn.Linear(1, 1, bias=False)
    e, optimizer, *_ = deepfast.initialize(model=p, config={**CONFIG, **config})
    for value in (1.0, 2.0**-9, 2.0**-9, 2.0**-9):
        e.backward(e(torch.tensor([[value]])).sum())
        e.step()
    kept = optimizer.state[p.weight]["exp_avg"] / 0.1
    torch.testing.assert_close(kept, torch.tensor([[(1 + 3 * 2.0**-9) / 4]]), rtol=1e-6, atol=0)
    assert p.weight.dtype == torch.bfloat16


def test_fp16_weights_and_gradients_round_and_overflow():
    """On a CPU too: only the arithmetic is fp32."""
    e = engine({"fp16": {"enabled": True, "loss_scale": 1.0}, "train_batch_size": 2, "gradient_accumulation_steps": 1})
    seen = []
    for p in e.module.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: seen.append((p.dtype, p.grad.dtype, p.grad.isinf().any().item()))
        )
    before = state(e)
    x, y = batches(1)[0]
    assert e(x).dtype == torch.float32  # on a CPU
    loss = nn.functional.mse_loss(e(x), y)
    e.backward(loss * 1e6), e.step()
    assert {(d, g) for d, g, _ in seen} == {(torch.float16, torch.float16)}
    assert any(inf for *_, inf in seen), "a gradient beyond 65504"
    assert equal(before, state(e))
    assert (e.skipped_steps, e.was_step_applied(), e.global_steps) == (1, False, 1)
    e.backward(nn.functional.mse_loss(e(x), y)), e.step()
    assert e.was_step_applied()
    assert not equal(before, state(e))


def test_how_fp16_is_computed_is_said_once(caplog):
    caplog.set_level(logging.INFO, "deepfast")
    engine({"fp16": True})
    assert [r.getMessage() for r in caplog.records if "fp16" in r.getMessage()] == [
        "fp16 on a CPU: weights and gradients are fp16, forward and backward compute in fp32"
    ]


def test_tied_weights_get_one_gradient_under_fp16():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    module = Tied()
    exact = module.a.weight.detach().half().float().requires_grad_()
    x = torch.randn(3, 4)
    (x @ exact.t() @ exact.t()).sum().backward()
    e, *_ = deepfast.initialize(
        model=module, config={**CONFIG, "fp16": {"enabled": True, "loss_scale": 1.0}, "gradient_accumulation_steps": 1}
    )
    e.backward(e(x).sum())
    assert module.b.weight is module.a.weight
    torch.testing.assert_close(safe_get_full_grad(module.a.weight), exact.grad, rtol=1e-3, atol=1e-3)


def test_the_scale_moves_and_the_schedule_waits_for_applied_steps():
    """A scheduler that advances through skipped steps."""
    config = {
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2},
        "gradient_accumulation_steps": 1,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}},
    }
    e = engine(config)
    scales, lrs = [], []
    for i, (x, y) in enumerate(batches(6)):
        loss = nn.functional.mse_loss(e(x), y)
        e.backward(loss * (float("inf") if i in (1, 2) else 1.0)), e.step()
        scales.append(e.loss_scale)
        lrs.append(e.get_lr()[0])
    assert scales == [16, 8, 4, 4, 8, 8]
    assert lrs == pytest.approx([0.0, 0.0, 0.0, 0.001, 0.002, 0.003])
    assert e.skipped_steps == 2


def test_clipping():
    clipped = engine({"gradient_clipping": 1e-3, "gradient_accumulation_steps": 1})
    plain = model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for x, y in batches(3):
        train(clipped, [(x, y)])
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
        optimizer.step()
        assert clipped.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(clipped.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"type": "WarmupLR", "params": {"warmup_min_lr": 0.1, "warmup_type": "linear"}},
         [0.1, 0.1, 0.4, 0.7, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0.1, "warmup_type": "linear"}},
         [0.1, 0.1, 0.4, 0.7, 1.0, 0.7, 0.4, 0.1, 0.1]),
        ({"type": "WarmupLR", "params": {}}, [0.0, 0.0, 0.63093, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.2, "warmup_type": "linear"}},
         [0.0, 0.0, 1 / 3, 2 / 3, 0.8, 0.4, 0.2, 0.2, 0.2]),
        ({"type": "WarmupCosine"}, [1 / 3, 2 / 3, 1.0, 1.0, 0.775, 0.325, 0.1, 0.1, 0.1]),
    ],
)  # fmt: skip
def test_schedules(section, expected):
    """DeepSpeed's, by its formulas: 3 warm-up steps of 6, its iteration count one behind ours."""
    parsed = configuration.SchedulerSection.model_validate(section)
    got = [schedule.rate(step - 1, parsed, 1.0, 3, 6) for step in range(9)]
    assert got == pytest.approx(expected, abs=1e-5)


def test_a_step_without_a_backward_is_refused():
    e = engine({"gradient_accumulation_steps": 1})
    with pytest.raises(RuntimeError, match="no backward"):
        e.step()
    assert (e.global_steps, e.micro_steps) == (0, 0)


def test_two_losses_in_one_step_are_summed_in_fp32():
    e = engine({"gradient_accumulation_steps": 1, "fp16": {"enabled": True, "loss_scale": 1.0}})
    for sign in (1.0, 1.0, -1.0):  # 40000 + 40000 is infinite in fp16
        e.backward(e(torch.ones(2, 6)).sum() * sign * 20000)
    e.step()
    assert e.was_step_applied()


def test_weights_that_make_no_sense():
    for weight in (0.0, float("inf")):
        e = engine({"gradient_accumulation_steps": 2})
        (x, y), *_ = batches(1)
        before = state(e)
        e.backward(nn.functional.mse_loss(e(x), y), weight), e.step()
        e.backward(nn.functional.mse_loss(e(x), y), weight)
        with pytest.raises(RuntimeError, match="weights of this step add up to"):
            e.step()
        assert equal(before, state(e))


def test_no_sync_and_zero_grad():
    e = engine({"gradient_accumulation_steps": 2})
    before = state(e)
    (x, y), *_ = batches(1)
    with e.no_sync():
        e.backward(nn.functional.mse_loss(e(x), y))
        with pytest.raises(RuntimeError, match="no_sync"):
            e.step()
    e.zero_grad()
    with torch.no_grad():
        assert not any(e._gradients.sums.present)
    assert equal(before, state(e))


def test_parameters_without_a_gradient_are_left_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    module = Two()
    before = module.unused.weight.detach().clone()
    e, optimizer, *_ = deepfast.initialize(model=module, config=CONFIG)
    train(e, batches(8))
    assert torch.equal(module.unused.weight, before)
    assert module.unused.weight not in optimizer.state
    assert int(optimizer.state[module.used.weight]["step"]) == 2


def test_bf16_and_buffers():
    module = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    for kind in ("fp16", "bf16"):
        e, *_ = deepfast.initialize(model=module, config={**CONFIG, kind: True})
        train(e, batches(8))
        assert module[1].num_batches_tracked > 0
        assert module[1].running_mean.isfinite().all()


# Ranks

RANKS = """
import json, sys, torch, deepfast
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.only_on_rank_1, self.unused = (nn.Linear(6, 3) for _ in range(4))
    def forward(self, x, both):
        return self.a(x) + self.b(x) + (self.only_on_rank_1(x) if both else 0)
torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
net = Net()
e, o, *_ = deepfast.initialize(model=net, config=json.loads(sys.argv[1]))
world, rank = e.world_size, e.rank
g = torch.Generator().manual_seed(3)
data = [(torch.randn(2, 6, generator=g), torch.randn(2, 3, generator=g)) for _ in range(16)]
accumulation = e.gradient_accumulation_steps()
for step in range(4):
    for i in range(accumulation):
        k = i * world + rank
        x, y = data[step * 4 + k]
        e.backward(nn.functional.mse_loss(e(x, k % 2 == 1), y))
        e.step()
if rank == 0:
    print(json.dumps({"sums": [p.double().sum().item() for p in net.parameters()], "norm": e.get_global_grad_norm(),
                      "steps": [int(o.state[p]["step"]) if p in o.state else 0 for p in net.parameters()],
                      "started": net.a.weight.numel()}))
if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_two_ranks_train_as_one(tmp_path, kind):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    results = []
    for launch, accumulation in (([sys.executable], 4), ([sys.executable, "-m", "torch.distributed.run",
                                                          "--standalone", "--nproc-per-node", "2"], 2)):  # fmt: skip
        config = {**CONFIG, "gradient_accumulation_steps": accumulation}
        if kind == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 8.0}
        done = run(*launch, script, json.dumps(config), env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    one, two = results
    assert two["steps"] == one["steps"] == [4] * 6 + [0] * 2
    assert two["sums"] == pytest.approx(one["sums"], rel=1e-4, abs=1e-4)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
