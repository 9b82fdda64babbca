"""The engine: DeepSpeed's interface, one step's arithmetic, checkpoints."""

from __future__ import annotations

import json
import logging
import sys
import types

import pytest
import torch
from conftest import run
from torch import nn

import deepfast
from deepfast.engine import checkpoint, schedule
from deepfast.engine import config as configuration
from deepfast.errors import ConfigError, UserError

CONFIG = {"train_batch_size": 8, "gradient_accumulation_steps": 4, "optimizer": {"params": {"lr": 0.01}}}


def model(seed=0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3), **options)


def engine(config=None, seed=0, **options) -> deepfast.Engine:
    return deepfast.initialize(model=model(seed), config={**CONFIG, **(config or {})}, **options)[0]


def batches(count, size=2):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g), torch.randn(size, 3, generator=g)) for _ in range(count)]


def train(e, data, weights=None) -> list[float]:
    losses = []
    for i, (x, y) in enumerate(data):
        loss = nn.functional.mse_loss(e(x).to(y.dtype), y)  # before torch 2.12 this mean takes no two dtypes
        e.backward(loss, *([] if weights is None else [weights[i]]))
        e.step()
        losses.append(loss.item())
    return losses


def state(e) -> list[torch.Tensor]:
    return [p.detach().clone() for p in e.module.parameters()]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
    e(x).sum().backward()
    assert module.b.weight is module.a.weight
    torch.testing.assert_close(module.a.weight.grad.float(), exact.grad, rtol=1e-3, atol=1e-3)


def test_the_scale_moves_and_the_schedule_waits_for_applied_steps():
    """ANCHORS 3.7: a scheduler that advances through skipped steps."""
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
    got = [schedule.factor(step, parsed, 1.0, 3, 6) for step in range(9)]
    assert got == pytest.approx(expected, abs=1e-5)


OPTIMIZERS = {
    "AdamW": {},
    "Adam": {"adam_w_mode": False, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Lion": {"betas": [0.9, 0.95]},
    "LAMB": {"eps": 1e-5},
    "Adagrad": {"lr_decay": 0.1},
}


@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "loss_scale": 8.0}}])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_from_the_configuration_and_from_a_checkpoint(tmp_path, kind, precision):
    config = {**CONFIG, **precision, "optimizer": {"type": kind, "params": {"lr": 0.01, **OPTIMIZERS[kind]}}}
    e, optimizer, *_ = deepfast.initialize(model=model(), config=config)
    assert type(optimizer).__name__ == kind
    data = batches(12)
    train(e, data[:8])
    e.save_checkpoint(tmp_path)
    again, *_ = deepfast.initialize(model=model(), config=config)
    again.load_checkpoint(tmp_path)
    for one in (e, again):
        train(one, data[8:])
    assert equal(state(e), state(again))


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_torchs_optimizers_are_replaced(kind):
    e, optimizer, *_ = deepfast.initialize(
        model=model(), optimizer=lambda params: getattr(torch.optim, kind)(params, lr=0.1), config=CONFIG
    )
    assert type(optimizer) is getattr(deepfast, kind)
    plain = model()
    torchs = getattr(torch.optim, kind)(plain.parameters(), lr=0.1)
    data = batches(4)
    for x, y in data:
        (nn.functional.mse_loss(plain(x), y) / 4).backward()
    torchs.step()
    train(e, data)
    for p, q in zip(e.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_replacing_torchs_adamw_keeps_what_hangs_on_it():
    m = model()
    theirs = torch.optim.AdamW(m.parameters(), lr=0.5, weight_decay=0.5, amsgrad=True, fused=True)
    seen = []
    theirs.register_step_post_hook(lambda *_: seen.append(1))
    e, optimizer, *_ = deepfast.initialize(model=m, optimizer=theirs, config=CONFIG)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert optimizer.param_groups[1]["weight_decay"] == 0.5
    assert optimizer.param_groups[1]["amsgrad"]
    train(e, batches(4))
    assert seen == [1]


def test_deepspeeds_defaults_and_questions():
    e = engine({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "bf16": True, "dataloader_drop_last": True},
               training_data=[(torch.zeros(6), torch.zeros(3))] * 9)  # fmt: skip
    group = e.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.0, (0.9, 0.999), 1e-8)
    assert (e.local_rank, e.global_rank, e.world_size, e.global_samples) == (0, 0, 1, 0)
    assert (e.fp16_enabled(), e.bfloat16_enabled()) == (False, True)
    assert (e.zero_optimization(), e.zero_optimization_stage()) == (False, 0)
    for drop, count in ((True, 4), (False, 5)):
        config = {**CONFIG, "dataloader_drop_last": drop}
        data = [(torch.zeros(6), torch.zeros(3))] * 9
        assert len(deepfast.initialize(model=model(), training_data=data, config=config)[2]) == count


def test_a_step_without_a_backward_is_refused():
    e = engine({"gradient_accumulation_steps": 1})
    with pytest.raises(RuntimeError, match="no backward"):
        e.step()
    assert (e.global_steps, e.micro_steps) == (0, 0)


def test_initialize_takes_what_deepspeeds_does(tmp_path, caplog):
    caplog.set_level(logging.INFO, "deepfast")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    dataset = [(torch.randn(6), torch.randn(3)) for _ in range(16)]
    args = types.SimpleNamespace(deepspeed_config=str(path), local_rank=0)
    e, optimizer, loader, scheduler = deepfast.initialize(args, model(), training_data=dataset)
    assert isinstance(optimizer, deepfast.AdamW)
    assert scheduler is None
    assert [x.shape for x, _ in loader] == [(2, 6)] * 8
    assert (e.train_batch_size(), e.train_micro_batch_size_per_gpu(), e.gradient_accumulation_steps()) == (8, 2, 4)

    m = model()
    theirs = torch.optim.AdamW(m.parameters(), lr=0.5)
    plan = torch.optim.lr_scheduler.StepLR(theirs, 1, gamma=0.1)
    e, optimizer, *_ = deepfast.initialize(model=m, optimizer=theirs, lr_scheduler=plan, config=str(path))
    assert isinstance(optimizer, deepfast.AdamW)
    assert any("replaced by deepfast.AdamW" in r.getMessage() for r in caplog.records)
    train(e, batches(4))
    assert e.get_lr() == [pytest.approx(0.05)]  # the scheduler made for the old one steers the new one

    e, optimizer, _, plan = deepfast.initialize(
        model=model(),
        optimizer=lambda params: torch.optim.RMSprop(params, lr=0.1),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        config=CONFIG,
    )
    assert isinstance(optimizer, torch.optim.RMSprop)
    before = state(e)
    train(e, batches(4))
    assert not equal(before, state(e))
    assert plan.get_last_lr() == [0.05]


def test_a_foreign_optimizer_steps_under_fp16():
    config = {"fp16": {"enabled": True, "loss_scale": 4.0}, "gradient_clipping": 0.1}
    e, *_ = deepfast.initialize(
        model=model(),
        optimizer=lambda params: torch.optim.RMSprop(params, lr=0.1, eps=0.1),
        config={**CONFIG, **config},
    )
    plain = model().half().float()
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=0.1, eps=0.1)
    data = batches(4)
    for x, y in data:
        (nn.functional.mse_loss(plain(x), y) / 4).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    optimizer.step()
    train(e, data)
    assert e.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-3)
    for p, q in zip(e.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=1e-3, atol=1e-3)
    before = state(e)
    for x, y in data:
        e.backward(nn.functional.mse_loss(e(x), y) * float("inf")), e.step()
    assert equal(before, state(e))
    assert e.skipped_steps == 1


def test_half_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK and MASTER_ADDR and MASTER_PORT not: start the ranks with torchrun"):
        engine()


def test_what_initialize_refuses():
    with pytest.raises(ConfigError, match="no configuration"):
        deepfast.initialize(model=model())
    with pytest.raises(ConfigError, match="no optimizer"):
        deepfast.initialize(model=model(), config={"train_batch_size": 1})
    with pytest.raises(ConfigError, match="= 24"):
        deepfast.initialize(model=model(), config={**CONFIG, "train_micro_batch_size_per_gpu": 6})
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        engine(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="model is missing"):
        deepfast.initialize(config=CONFIG)
    with pytest.raises(ValueError, match="model parallelism"):
        deepfast.initialize(model=model(), config=CONFIG, mpu=object())


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_foreign_optimizers_on_one_rank_without_accumulation(kind, cls):
    config = {"train_batch_size": 2, "gradient_accumulation_steps": 1, kind: True}
    e, *_ = deepfast.initialize(model=model(), optimizer=lambda p: cls(p, lr=0.1), config=config)
    before = state(e)
    train(e, batches(2))
    assert not equal(before, state(e))


def test_two_losses_in_one_step_are_summed_in_fp32():
    e = engine({"gradient_accumulation_steps": 1, "fp16": {"enabled": True, "loss_scale": 1.0}})
    for sign in (1.0, 1.0, -1.0):  # 40000 + 40000 is infinite in fp16
        e.backward(e(torch.ones(2, 6)).sum() * sign * 20000)
    e.step()
    assert e.was_step_applied()


def test_weights_that_make_no_sense():
    for weight in (0.0, float("nan"), -1.0):
        e = engine({"gradient_accumulation_steps": 2})
        (x, y), *_ = batches(1)
        before = state(e)
        e.backward(nn.functional.mse_loss(e(x), y), weight), e.step()
        e.backward(nn.functional.mse_loss(e(x), y), weight)
        with pytest.raises(RuntimeError, match="weights of this step add up to"):
            e.step()
        assert equal(before, state(e))


def test_recomputed_activations_under_fp16_on_a_cpu():
    module = model()
    module[0].gradient_checkpointing = True
    e, *_ = deepfast.initialize(model=module, config={**CONFIG, "fp16": True})
    with pytest.raises(RuntimeError, match="turn gradient checkpointing off"):
        e(torch.ones(2, 6))


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
        assert not any(e._sums.present)
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


# Checkpoints


@pytest.mark.parametrize("config", [{}, {"fp16": True}, {"bf16": True}])
def test_resuming_gives_the_same_bits(tmp_path, config):
    schedule = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 9}}
    first = engine({**config, "scheduler": schedule})
    data = batches(24)
    train(first, data[:8])
    path = first.save_checkpoint(tmp_path, client_state={"epoch": 3, "name": "x"})
    rest = train(first, data[8:])
    second = engine({**config, "scheduler": schedule}, seed=5)
    torch.manual_seed(99)
    loaded, client = second.load_checkpoint(tmp_path)
    assert (loaded, client) == (str(path), {"epoch": 3, "name": "x"})
    assert (second.global_steps, second.micro_steps) == (2, 8)
    assert train(second, data[8:]) == rest
    assert equal(state(first), state(second))
    assert first.get_lr() == second.get_lr()
    assert first.loss_scale == second.loss_scale


@pytest.mark.parametrize("kind", ["StepLR", "MultiStepLR", "SequentialLR"])
def test_a_clients_scheduler_resumes_as_it_was(tmp_path, kind):
    def make(optimizer):
        schedulers = torch.optim.lr_scheduler
        if kind == "StepLR":
            return schedulers.StepLR(optimizer, 2, gamma=0.1)
        several = schedulers.MultiStepLR(optimizer, [2, 3], gamma=0.1)  # its state has integers as keys
        if kind == "MultiStepLR":
            return several
        return schedulers.SequentialLR(optimizer, [several, schedulers.ConstantLR(optimizer)], [4])

    config = {"gradient_accumulation_steps": 1}
    first, second = engine(config, lr_scheduler=make), engine(config, lr_scheduler=make)
    train(first, batches(2))
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    for _ in range(3):
        train(first, batches(1)), train(second, batches(1))
        assert first.get_lr() == second.get_lr()


def test_what_the_configuration_says_holds_after_loading(tmp_path):
    def configured(lr, steps, weight_decay, **more):
        return engine(
            {
                "gradient_accumulation_steps": 1,
                "optimizer": {"params": {"lr": lr, "weight_decay": weight_decay}},
                "scheduler": {"type": "WarmupCosine", "params": {"warmup_num_steps": 0, "total_num_steps": steps}},
                "fp16": {"enabled": True, **more},
            }
        )

    first = configured(0.01, 10, 0.1, initial_scale_power=4)
    train(first, batches(2))
    assert first.get_lr() == [pytest.approx(0.01 * schedule.warmup_cosine(2, 0, 10))]
    first.save_checkpoint(tmp_path)
    second = configured(0.1, 20, 0.0, loss_scale=128.0)
    second.load_checkpoint(tmp_path)
    assert second.get_lr() == [pytest.approx(0.1 * schedule.warmup_cosine(2, 0, 20))]
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.0
    assert second.loss_scale == 128.0
    train(second, batches(1))
    assert second.get_lr() == [pytest.approx(0.1 * schedule.warmup_cosine(3, 0, 20))]
    third = configured(0.01, 10, 0.1, initial_scale_power=8)
    third.load_checkpoint(tmp_path)
    assert third.loss_scale == 16.0, "a dynamic scale goes on from where it was"


def test_changing_the_precision_keeps_the_fp32_values(tmp_path):
    for i, (source, target) in enumerate((({}, {"fp16": True}), ({"bf16": True}, {}))):
        first, second = engine(source), engine(target)
        train(first, batches(8))
        first.save_checkpoint(tmp_path / str(i))
        second.load_checkpoint(tmp_path / str(i))
        for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True):
            exact = first.optimizer.state[p].get("master", p)
            assert torch.equal(second.optimizer.state[q].get("master", q), exact)


def test_a_checkpoint_in_the_middle_of_a_step_goes_back_to_its_beginning(tmp_path):
    first, second = engine(), engine(seed=3)
    data = batches(12)
    train(first, data[:6])
    first.save_checkpoint(tmp_path, 5)
    second.load_checkpoint(tmp_path, 5)
    assert (second.global_steps, second.micro_steps) == (1, 4)
    again = engine()
    train(again, data[:4])
    assert train(again, data[4:]) == train(second, data[4:])


def test_random_state_travels(tmp_path):
    e = engine()
    e.save_checkpoint(tmp_path)
    expected = torch.rand(3)
    torch.rand(7)
    e.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_can_be_checked_with_coreutils(tmp_path):
    path = engine().save_checkpoint(tmp_path, "a")
    assert run("sha256sum", "--check", checkpoint.CHECKSUMS, cwd=path).returncode == 0
    assert (tmp_path / "latest").read_text().strip() == "a"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "rank0.safetensors",
                                  checkpoint.CHECKSUMS])  # fmt: skip
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_is_named_and_an_intact_one_offered(tmp_path, name, how):
    e = engine()
    e.save_checkpoint(tmp_path, "old")
    e.save_checkpoint(tmp_path, "new")
    path = tmp_path / "new" / name
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if how == "flip" else data[: len(data) // 2])
    before = state(e)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        e.load_checkpoint(tmp_path)
    assert "new" in str(caught.value)
    assert "'old' is intact" in str(caught.value)
    if name != checkpoint.CHECKSUMS or how == "remove":
        assert str(path) in str(caught.value)
    assert equal(before, state(e))
    e.load_checkpoint(tmp_path, "old")


def test_checkpoints_that_are_missing_or_do_not_fit(tmp_path, caplog):
    e = engine()
    assert e.load_checkpoint(tmp_path) == (None, {})
    assert "no checkpoint" in caplog.text
    with pytest.raises(checkpoint.CheckpointError, match=r"no such checkpoint \(there are: none\)"):
        e.load_checkpoint(tmp_path, "a")
    e.save_checkpoint(tmp_path, "a")
    other, *_ = deepfast.initialize(model=nn.Linear(6, 3), config=CONFIG)
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        other.load_checkpoint(tmp_path)
    foreign, *_ = deepfast.initialize(
        model=model(5), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), config=CONFIG
    )
    before = state(foreign)
    train(foreign, batches(4))
    foreign.save_checkpoint(tmp_path / "sgd")
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this optimizer"):
        e.load_checkpoint(tmp_path / "sgd")
    assert equal(state(e), state(engine())), "a load that fails leaves the model alone"
    assert not equal(before, state(foreign))
    text = (tmp_path / "a" / "state.json").read_text()
    (tmp_path / "a" / "state.json").write_text(text.replace('"format": 1', '"format": 2'))
    (tmp_path / "a" / checkpoint.CHECKSUMS).write_text(run("sha256sum", "state.json", cwd=tmp_path / "a").stdout)
    with pytest.raises(checkpoint.CheckpointError, match="format 2 is not known"):
        e.load_checkpoint(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="name of a folder"):
        e.save_checkpoint(tmp_path, "../b")
    with pytest.raises(checkpoint.CheckpointError, match=r"no pickles.*not set"):
        e.save_checkpoint(tmp_path, "b", {"x": {1}})
    assert (tmp_path / "latest").read_text().strip() == "a"
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.CheckpointError, match="cannot be written"):
        e.save_checkpoint(tmp_path / "file")


def test_latest_is_found_when_its_file_is_lost(tmp_path):
    e = engine()
    e.save_checkpoint(tmp_path, "a")
    e.save_checkpoint(tmp_path, "b")
    for damage in (lambda p: p.write_bytes(b"\xff"), lambda p: p.write_text(""), lambda p: p.unlink()):
        damage(tmp_path / "latest")
        assert checkpoint.latest(tmp_path) == "b"
    (tmp_path / "latest").mkdir()
    assert checkpoint.latest(tmp_path) == "b"


def test_what_json_does_not_know_comes_back():
    value = {"a": (1, 2.5, None), "b": {3: "x", (4,): [True]}, "c": torch.tensor([1, 2]), "d": {"__x": 1}}
    back = checkpoint.restore(json.loads(json.dumps(checkpoint.plain(value))))
    assert torch.equal(back.pop("c"), value.pop("c"))
    assert back == value


def test_saving_again_and_pruning(tmp_path):
    e = engine()
    for tag in ("a", "b", "c", "b"):
        e.save_checkpoint(tmp_path, tag)
        (tmp_path / ".x.tmp").mkdir(exist_ok=True)
        checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "latest"]
    e.load_checkpoint(tmp_path)
    # Killed between the two renames of saving the same tag again: the old one is found.
    (tmp_path / "b").rename(tmp_path / ".b.old")
    assert e.load_checkpoint(tmp_path)[0] == str(tmp_path / "b")


def test_no_pickle_is_read(tmp_path, monkeypatch):
    import pickle

    e = engine()
    e.save_checkpoint(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    e.load_checkpoint(tmp_path)


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


def test_a_deepspeed_script_runs_with_one_line_changed(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse, torch\nimport deepfast as deepspeed\n"
        "parser = argparse.ArgumentParser(); parser.add_argument('--local_rank', type=int, default=-1)\n"
        "parser = deepspeed.add_config_arguments(parser); args = parser.parse_args()\n"
        "net = torch.nn.Linear(4, 2)\n"
        "engine, optimizer, loader, _ = deepspeed.initialize(args=args, model=net,"
        " model_parameters=net.parameters(), training_data=[(torch.randn(4), torch.tensor(i % 2)) for i in range(8)])\n"
        "for x, y in loader:\n"
        "    loss = torch.nn.functional.cross_entropy(engine(x.to(engine.device)), y.to(engine.device))\n"
        "    engine.backward(loss)\n    engine.step()\n"
        "print(engine.global_steps)\n"
    )
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    done = run(sys.executable, script, "--deepspeed", "--deepspeed_config", tmp_path / "ds.json", cwd=tmp_path)
    assert done.stdout.strip() == "1", done.stderr
