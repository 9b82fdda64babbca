"""What an engine is made of: DeepSpeed's interface, its optimizers and torch's, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import sys
import types

import pytest
import torch
from cases import CONFIGURED, NAMES
from conftest import run
from engines import CONFIG, batches, engine, equal, model, state, train
from torch import nn

import deepfast
from deepfast.errors import ConfigError, UserError


@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "loss_scale": 8.0}}])
@pytest.mark.parametrize("kind", NAMES)
def test_every_optimizer_from_the_configuration_and_from_a_checkpoint(tmp_path, kind, precision):
    config = {**CONFIG, **precision, "optimizer": {"type": kind, "params": {"lr": 0.01, **CONFIGURED.get(kind, {})}}}
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


def test_the_optimizer_that_was_replaced_saves_and_loads_what_is_stepped():
    m = model()
    theirs = torch.optim.AdamW(m.parameters(), lr=0.1)
    e, ours, *_ = deepfast.initialize(model=m, optimizer=theirs, config=CONFIG)
    train(e, batches(4))
    kept = copy.deepcopy(theirs.state_dict())
    assert len(kept["state"]) == 4
    train(e, batches(4))
    theirs.load_state_dict(kept)
    assert all(int(state["step"]) == 1 for state in ours.state.values())


@pytest.mark.parametrize(("kind", "why"), [("LBFGS", "closure"), ("SparseAdam", "sparse")])
def test_optimizers_that_an_engine_cannot_step(kind, why):
    with pytest.raises(ConfigError, match=why):
        deepfast.initialize(model=model(), optimizer=getattr(torch.optim, kind), config=CONFIG)


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
    with pytest.raises(ConfigError, match="no optimizer: pass optimizer="):
        deepfast.initialize(model=model(), config={"train_batch_size": 1, "optimizer": "auto"})
    with pytest.raises(ConfigError, match="no configuration"):
        deepfast.initialize(model=model())
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


def test_keys_of_the_trainer_are_told(caplog):
    given = {**CONFIG, "seed": 3, "output_dir": "here", "num_train_steps": 9, "eval_steps": None}
    deepfast.initialize(model=model(), config=given)
    (told,) = [r.getMessage() for r in caplog.records if "of the trainer" in r.getMessage()]
    assert told.endswith("without effect in initialize(): output_dir, seed")
