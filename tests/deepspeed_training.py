"""Further checks of deepspeed_names.py: DeepSpeed's optimizers, and the weights of checkpoints."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from engines import batches, engine, equal, train
from torch import nn

import deepfast
from deepfast.errors import UserError


def trained(optimizer, steps=3, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    o = optimizer(net.parameters(), **options)
    for x, y in batches(steps):
        o.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        o.step()
    return [p.detach() for p in net.parameters()]


def check_the_optimizers_step_as_ours_with_their_defaults():
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    w = {"weight_decay": 0.1}
    adam, adamw = trained(deepfast.Adam, **w), trained(deepfast.AdamW, **w)
    assert not equal(adam, adamw)
    for one, mode in ((FusedAdam, "adam_w_mode"), (DeepSpeedCPUAdam, "adamw_mode")):
        assert issubclass(one, deepfast.Adam)
        assert equal(trained(one, **w), adamw)
        assert equal(trained(one, **w, **{mode: False}), adam)
        assert equal(trained(one), trained(deepfast.AdamW, weight_decay=0))
        uncorrected = trained(one, bias_correction=False)
        assert equal(uncorrected, trained(deepfast.AdamW, weight_decay=0, bias_correction=False))
        assert not equal(uncorrected, trained(one))
        amsgrad = trained(one, lr=0.1, steps=6, amsgrad=True)
        assert equal(amsgrad, trained(deepfast.AdamW, lr=0.1, steps=6, weight_decay=0, amsgrad=True))
    for one in (FusedLion, DeepSpeedCPULion):
        assert equal(trained(one), trained(deepfast.Lion, lr=1e-3, betas=(0.9, 0.999)))
    assert equal(trained(DeepSpeedCPUAdagrad, eps=1e-3), trained(deepfast.Adagrad, eps=1e-3))
    assert equal(trained(FusedLamb), trained(deepfast.LAMB, eps=1e-8, weight_decay=0))
    assert not equal(trained(FusedLamb, lr=0.1, max_grad_norm=0.1), trained(FusedLamb, lr=0.1))


def check_the_optimizers_refuse_what_they_cannot():
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import FusedLion

    for one, option in (
        (FusedAdam, {"set_grad_none": False}),
        (FusedLion, {"set_grad_none": False}),
        (FusedLamb, {"bias_correction": False}),
        (FusedLamb, {"eps_inside_sqrt": True}),
        (FusedLamb, {"max_coeff": 2.0}),
        (FusedLamb, {"amsgrad": True}),
        (DeepSpeedCPUAdagrad, {"amsgrad": True}),
    ):
        with pytest.raises(ValueError, match=f"{one.__name__}: {next(iter(option))}"):
            one([nn.Parameter(torch.ones(2))], **option)


def check_optimizers_made_anew_keep_their_options():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    p = nn.Parameter(torch.ones(4).bfloat16())
    o = FusedAdam([p], adam_w_mode=False, weight_decay=0.5)
    again = type(o)([p], **o.defaults)
    assert again.param_groups[0]["decoupled_weight_decay"] is again.adam_w_mode is False
    p.grad = torch.ones_like(p)
    o.step()
    other = FusedAdam([p])
    other.load_state_dict(o.state_dict())
    assert other.param_groups[0]["decoupled_weight_decay"] is True
    assert other.param_groups[0]["weight_decay"] == 0.5
    narrow = DeepSpeedCPUAdam([p], fp32_optimizer_states=False)
    narrow.step()
    assert narrow.state[p]["exp_avg"].dtype == torch.bfloat16


def check_the_engine_takes_them():
    import deepspeed
    from deepspeed.ops.adam import FusedAdam

    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    config = {"train_batch_size": 2, "bf16": {"enabled": True}, "gradient_clipping": 0.5}
    e, o, *_ = deepspeed.initialize(model=net, optimizer=FusedAdam(net.parameters()), config=config)
    assert isinstance(e, deepspeed.DeepSpeedEngine)
    assert isinstance(o, FusedAdam)
    assert o.max_grad_norm == 0.5
    train(e, batches(2))
    assert e.global_steps == 2


def check_fp32_weights_of_a_checkpoint(tmp):
    from deepspeed.utils.zero_to_fp32 import (
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
    )

    for precision in ({"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 1.0}}, {}):
        e = engine(precision, seed=2)
        e.module.register_buffer("count", torch.tensor(7))
        e.module[0].bias.requires_grad_(False)
        train(e, batches(8))
        path = e.save_checkpoint(tmp / "weights", tag="a")
        values = get_fp32_state_dict_from_zero_checkpoint(tmp / "weights")
        assert values.keys() == e.module.state_dict().keys()
        for name, p in e.module.named_parameters():
            expected = e.optimizer.get_master(p) if precision and p in e.optimizer.state else p.float()
            assert torch.equal(values[name], expected), name
        assert (values["count"], values["count"].dtype) == (7, torch.int64)
    fresh = engine(seed=9).module
    fresh.register_buffer("count", torch.tensor(0))
    assert load_state_dict_from_zero_checkpoint(fresh, tmp / "weights", "a") is fresh
    assert equal(fresh.state_dict().values(), [values[name] for name in fresh.state_dict()])
    with pytest.raises(UserError, match="another model"):
        load_state_dict_from_zero_checkpoint(nn.Linear(2, 2), tmp / "weights")
    written = {
        "out": "out/pytorch_model.bin",
        "out.pt": "out.pt",
        "sub/out.safetensors": "sub/out.safetensors",
    }
    for out, file in written.items():
        assert convert_zero_checkpoint_to_fp32_state_dict(tmp / "weights", tmp / out, tag="a") == tmp / file
        from safetensors.torch import load_file

        back = load_file(tmp / file) if file.endswith("safetensors") else torch.load(tmp / file)
        assert equal([back[name] for name in values], values.values())
    safe = convert_zero_checkpoint_to_fp32_state_dict(tmp / "weights", tmp / "safe", safe_serialization=True)
    assert safe == tmp / "safe" / "model.safetensors"
    with pytest.raises(UserError, match="exclude_frozen"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp / "weights", tmp / "x", exclude_frozen_parameters=True)
    (path / "state.json").write_text((path / "state.json").read_text() + " ")
    with pytest.raises(UserError, match="is damaged"):
        get_fp32_state_dict_from_zero_checkpoint(tmp / "weights")
    with pytest.raises(UserError, match="holds no checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(tmp / "nothing")


def check_tied_weights_come_back(tmp):
    from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    def tied():
        net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        net[1].weight = net[0].weight
        return net

    e, *_ = deepfast.initialize(model=tied(), config={"train_batch_size": 2, "optimizer": {}})
    e.save_checkpoint(tmp / "tied")
    back = load_state_dict_from_zero_checkpoint(tied(), tmp / "tied")
    assert equal(back.state_dict().values(), e.module.state_dict().values())


def check_the_command_that_writes_them(tmp):
    command = [sys.executable, "-m", "deepfast.deepspeed.zero_to_fp32"]
    engine().save_checkpoint(tmp / "command")
    done = subprocess.run([*command, tmp / "command", tmp / "o.bin"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp / 'o.bin'}\n"), done.stderr
    done = subprocess.run([*command, tmp / "absent", tmp / "o.bin"], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "absent holds no checkpoint" in done.stderr


CHECKS = {name: check for name, check in vars().items() if name.startswith("check_")}
