"""Schedules step for step as DeepSpeed 0.19.8's classes: its values stand here."""

from __future__ import annotations

import pytest
import torch
from engines import batches, engine, equal, state, train
from torch import nn

import deepfast
from deepfast.engine import config, schedule
from deepfast.errors import ConfigError

STEPS = 9
CYCLE = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 2}
# type, params, the learning rates of two groups (one list: the same), the first betas likewise
CASES = [
    ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 3},
     [[0.01, 0.01, 0.0667837] + [0.1] * 6, [0.01, 0.01, 0.129877] + [0.2] * 6], None),
    ("WarmupLR", {"warmup_num_steps": 4.0, "last_batch_iteration": 0, "warmup_type": "linear", "warmup_max_lr": 0.02},
     [[0.01, 0.005, 0.01, 0.015] + [0.02] * 5, [0.1, 0.005, 0.01, 0.015] + [0.02] * 5], None),
    ("WarmupDecayLR", {"total_num_steps": 6.0, "warmup_num_steps": 3, "warmup_type": "linear"},
     [[0, 0, 0.000333333, 0.000666667, 0.001, 0.000666667, 0.000333333, 0, 0]], None),
    ("WarmupCosineLR", {"total_num_steps": 6, "warmup_num_steps": 3, "warmup_min_ratio": 0.5},
     [[0, 0.005, 0.00815465, 0.01, 0.00750025, 0.00250075, 1e-06, 1e-06, 1e-06],
      [0, 0.05, 0.0815465, 0.1, 0.0750025, 0.0250075, 1e-05, 1e-05, 1e-05]], None),
    ("LRRangeTest",
     {"lr_range_test_min_lr": [0.001, 0.002], "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0},
     [[0.001, 0.00166667, 0.00233333, 0.003, 0.00366667, 0.00433333, 0.005, 0.00566667, 0.00633333],
      [0.002, 0.00333333, 0.00466667, 0.006, 0.00733333, 0.00866667, 0.01, 0.0113333, 0.0126667]], None),
    ("LRRangeTest", {"lr_range_test_step_size": 3, "lr_range_test_staircase": True},
     [[0.001] * 3 + [0.002] * 3 + [0.003] * 3], None),
    ("OneCycle",
     {"cycle_min_lr": 0.001, "cycle_max_lr": [0.01, 0.02], "cycle_first_step_size": 3, "cycle_second_step_size": 2,
      "decay_step_size": 2, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01},
     [[0.001, 0.004, 0.007, 0.01, 0.0055, 0.001, 0.0008, 0.000666667, 0.000571429],
      [0.001, 0.00733333, 0.0136667, 0.02, 0.0105, 0.001, 0.0008, 0.000666667, 0.000571429]],
     [[0.8, 0.866667, 0.833333, 0.8, 0.85, 0.9, 0.9045, 0.909, 0.9135]]),
    ("OneCycle",
     {**CYCLE, "cycle_first_step_size": 4, "cycle_first_stair_count": 2, "cycle_min_mom": 0.85,
      "cycle_max_mom": [0.95, 0.9]},
     [[0.001, 0.001, 0.0055, 0.0055, 0.01, 0.0055, 0.0055, 0.001, 0.001]],
     [[0.85, 0.95, 0.9, 0.9, 0.85, 0.9, 0.9, 0.95, 0.95], [0.85, 0.9, 0.875, 0.875, 0.85, 0.875, 0.875, 0.9, 0.9]]),
    ("OneCycle", {**CYCLE, "cycle_momentum": False}, [[0.001, 0.0055, 0.01, 0.0055] + [0.001] * 5], None),
]  # fmt: skip


def scheduled(kind, params) -> tuple[torch.optim.Optimizer, schedule.Schedule]:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.01, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    made = schedule.from_config(config.load({"scheduler": {"type": kind, "params": params}}), optimizer)
    return optimizer, made


def rates(optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def betas(optimizer) -> list[tuple[float, float]]:
    return [group["betas"] for group in optimizer.param_groups]


@pytest.mark.parametrize(("kind", "params", "expected", "moments"), CASES)
def test_deepspeeds_values(kind, params, expected, moments):
    optimizer, made = scheduled(kind, params)
    second = 0.99 if moments else 0.999
    for step in range(STEPS):
        assert rates(optimizer) == pytest.approx([expected[0][step], expected[-1][step]], rel=1e-5)
        assert made.get_last_lr() == rates(optimizer)
        first = moments or [[0.9] * STEPS]
        assert betas(optimizer)[0] == pytest.approx((first[0][step], second), rel=1e-5)
        assert betas(optimizer)[1] == pytest.approx((first[-1][step], second), rel=1e-5)
        jumped, moved = scheduled(kind, params)
        schedule.move_to(moved, step)
        assert (rates(jumped), betas(jumped), moved.get_last_lr()) == (
            rates(optimizer),
            betas(optimizer),
            made.get_last_lr(),
        )
        optimizer.step()
        made.step()


@pytest.mark.parametrize(
    "section",
    [
        {"type": "OneCycle", "params": {**CYCLE, "decay_step_size": 1, "decay_lr_rate": 0.5}},
        {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 2}},
    ],
    ids=["OneCycle", "LRRangeTest"],
)
def test_a_resumed_run_goes_on(section, tmp_path):
    options = {"gradient_accumulation_steps": 1, "train_batch_size": 2, "scheduler": section}
    data = batches(8)
    first, second = engine(options), engine(options, seed=1)
    train(first, data[:3])
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    for e in (first, second):
        train(e, data[3:])
    assert second.get_lr() == first.get_lr() != engine(options).get_lr()
    assert betas(second.optimizer) == betas(first.optimizer)
    assert equal(state(first), state(second))


def test_a_rate_that_is_a_tensor_is_filled():
    lr = torch.tensor(0.5)
    optimizer = deepfast.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    made = schedule.from_config(config.load({"scheduler": {"type": "OneCycle", "params": CYCLE}}), optimizer)
    optimizer.step()
    made.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.0055)


def test_a_cycle_leaves_momentum_alone_where_there_are_no_betas(caplog):
    e = engine(
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.5}}, "scheduler": {"type": "OneCycle", "params": CYCLE}}
    )
    assert e.optimizer.param_groups[0]["momentum"] == 0.5
    assert "SGD has no betas" in caplog.text


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}, "cycle_max_lr is missing: OneCycle needs it"),
        ({"type": "OneCycle", "params": {**CYCLE, "total_num_steps": 3}}, "total_num_steps: OneCycle has none"),
        ({"type": "WarmupLR", "params": {"cycle_min_lr": 0.1}}, "scheduler.params.cycle_min_lr: WarmupLR has none"),
        ({"type": "WarmupCosineLR", "params": {"warmup_min_lr": 0.1}}, "did you mean 'warmup_min_ratio'?"),
        ({"type": "WarmUpLR"}, "scheduler.type='WarmUpLR': unknown: did you mean 'WarmupLR'?"),
        ({"type": "StepLR"}, "pass one as lr_scheduler= to initialize()"),
        ({"type": "WarmupDecayLR"}, "scheduler.params.total_num_steps is missing"),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}, "2 values for 1 groups of parameters"),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": ["x"]}}, 'scheduler.params.warmup_max_lr=["x"]'),
    ],
)
def test_what_cannot_be_a_schedule(section, message):
    with pytest.raises(ConfigError) as caught:
        engine({"scheduler": section})
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 200
