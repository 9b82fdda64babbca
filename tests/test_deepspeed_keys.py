"""DeepSpeed's keys, values and files: what it takes is taken, with a word where it means something else."""

from __future__ import annotations

import argparse
import base64
import json
import logging

import pytest
import torch
from engines import CONFIG, batches, engine, equal, model, state, train
from torch import nn

import deepfast
from deepfast.engine import config
from deepfast.errors import ConfigError

OFF = {"device": "none"}
ZERO = {
    **dict.fromkeys("contiguous_gradients reduce_scatter allgather_partitions override_module_apply".split(), True),
    **dict.fromkeys("zero_quantized_weights zero_quantized_gradients legacy_stage1 compute_grad_norm".split(), False),
    "memory_efficient_linear": False,
    "stage3_gather_fp16_weights_on_model_save": True,
    "zero_hpz_partition_size": 1,
    "leaf_module": {"classes": ["Block"]},
    "offload_param": OFF,
}
ACCEPTED = [
    {"bfloat16": {"enabled": False}},
    {"zero_optimization": False},
    {"zero_optimization": {**ZERO, "stage": "1", "cpu_offload": False, "zenflow": None}},
    {"seq_parallel_communication_data_type": "fp32", "gradient_predivide_factor": 1.0, "graph_harvesting": False},
    {"data_types": {"grad_accum_dtype": "bf16", "keep_in_fp32_modules": [], "param_dtype": None}},
    {"bf16": {"enabled": False, "immediate_grad_update": True, "bf16_master_weights_and_grads": False}},
    {"fp16": {"enabled": False, "min_loss_scale": 0, "initial_scale_power": "32", "hysteresis": 2.0}},
    {
        "optimizer": {
            "type": "adamw",
            "params": {"lr": 0, "fused": True, "bias_correction": True},
            "legacy_fusion": True,
        }
    },
    {"optimizer": {"type": "Adam", "params": {"betas": (0.9, 0.95), "fp32_optimizer_states": True}}},
    {"gradient_allreduce_op": "mean", "managed_gradient_accumulation": True, "sequence_parallel_size": 1},
    {"train_batch_size": 8.0, "seed": 1e3, "_comment": "why", "fp16": {"_note": {"a": 1}}},
    {"compression_training": {"head_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {"a": 1}}}},
    {"compression_training": {"layer_reduction": {"enabled": False, "keep_number_layer": 5}}},
    {
        "data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}},
        "elasticity": {"max_train_batch_size": 8},
    },
    {
        "torch_autocast": {"enabled": False, "dtype": "bf16"},
        "tensor_parallel": {"autotp_size": 0},
        "pipeline": {"a": 1},
    },
]


@pytest.mark.parametrize("keys", ACCEPTED, ids="-".join)
def test_it_trains(keys):
    e = engine(keys)
    train(e, batches(4))
    assert e.global_steps == 1


REFUSED = [
    ({"data_efficiency": {"enabled": True}}, "data_efficiency: is not supported"),
    ({"compression_training": {"head_pruning": {"shared_parameters": {"enabled": True}}}}, "compression_training"),
    ({"gradient_allreduce_op": "sum"}, "gradients are averaged over the ranks"),
    ({"managed_gradient_accumulation": False}, "every step() counts a micro-batch"),
    ({"sequence_parallel_size": 2}, "sequence parallelism is not built yet"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: is not supported"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "masters are fp32"),
    ({"bfloat16": {"enabled": True, "bf16_optimizer_states": True}}, "use optimizer.params.state_dtype"),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype: is not supported"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights"),
    ({"optimizer": {"params": {"max_grad_norm": 1.0}}}, "use gradient_clipping"),
    ({"optimizer": {"params": {"fp32_optimizer_states": False}}}, "use optimizer.params.state_dtype"),
    ({"optimizer": {"type": "Lamb", "params": {"max_coeff": 0.3}}}, "LAMB is the paper's"),
    ({"optimizer": {"type": "muon"}}, "optimizer.type='muon' is not built yet"),
    ({"optimizer": {"type": "LBFGS"}}, "needs a closure"),
    ({"optimizer": {"type": "RMSProp"}}, "optimizer.type='RMSProp': unknown: did you mean 'RMSprop'?"),
    ({"optimizer": {"type": "RMSprop", "params": {"alpah": 0.9}}}, "optimizer.params.'alpah': RMSprop has none"),
    ({"optimizer": {"type": "RMSprop", "params": {"alpha": "x"}}}, "alpha='x': RMSprop's default is 0.99"),
    ({"optimizer": {"type": "RMSprop", "params": {"lr": "x"}}}, 'optimizer.params.lr="x": it must be a number'),
    ({"optimizer": {"type": "RMSprop", "params": {"alpha": -1.0}}}, "optimizer: Invalid alpha value: -1.0"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: it must be less than or equal to 3"),
    ({"train_batch_size": "auto"}, 'train_batch_size="auto": only a framework could fill that in: write a number'),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_it_is_refused_in_one_line(keys, message):
    with pytest.raises(ConfigError) as caught:
        engine(keys)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_zero_by_a_word():
    assert engine({"zero_optimization": True}).zero_optimization_stage() == 1
    assert engine({"zero_optimization": False}).zero_optimization_stage() == 0


@pytest.mark.parametrize(
    "keys",
    [
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "nvme"},
            }
        },
        {"zero_optimization": {"cpu_offload": True}},
        {"offload_optimizer": {"device": "cpu"}},
    ],
)
def test_offloading_is_said_to_be_none(keys, caplog):
    train(engine(keys), batches(4))
    (said,) = (r.getMessage() for r in caplog.records if "offload" in r.getMessage())
    assert said.endswith("offloading is not built yet: the state stays on the device")


# What stands for what was not written.


def test_gradients_are_clipped_at_1_unless_it_says_otherwise(caplog):
    """As in DeepSpeed since 0.19.3, and it is said."""
    given = {key: value for key, value in CONFIG.items() if key != "gradient_clipping"}
    default = deepfast.initialize(model=model(), config=given)[0]
    (said,) = (r.getMessage() for r in caplog.records if "gradient_clipping" in r.getMessage())
    assert said == "no gradient_clipping in the configuration: 1.0, as in DeepSpeed; 0 turns it off"
    caplog.clear()
    written, off = engine({"gradient_clipping": 1.0}), engine({"gradient_clipping": 0})
    assert "gradient_clipping" not in caplog.text
    data = [(x, 100 * y) for x, y in batches(8)]
    for e in (default, written, off):
        train(e, data)
    assert default.get_global_grad_norm() > 1
    assert equal(state(default), state(written))
    assert not equal(state(default), state(off))


@pytest.mark.parametrize("kind", [deepfast.SGD, torch.optim.SGD, torch.optim.Rprop])
def test_the_callers_optimizer_is_clipped_too_but_for_its_own_norm(kind):
    def moved(**options) -> float:
        net = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(net.weight)
        optimizer = kind(net.parameters(), lr=1.0, **options)
        e = deepfast.initialize(model=net, optimizer=optimizer, config={"train_batch_size": 1})[0]
        e.backward(100 * e(torch.tensor([[3.0, 4.0]])).sum())
        e.step()
        return net.weight.norm().item()

    if kind is torch.optim.Rprop:
        assert moved() == pytest.approx(2**0.5)  # by the signs alone
        return
    assert moved() == pytest.approx(1.0)
    if kind is deepfast.SGD:
        assert moved(max_grad_norm=2.0) == pytest.approx(2.0)


def test_what_auto_became_is_said(caplog):
    keys = {
        "optimizer": {"params": {"lr": "auto", "betas": "auto", "weight_decay": 0.5}},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"reduce_bucket_size": "auto"},
        "_why": "auto",
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }
    engine(keys)
    (said,) = (r.getMessage() for r in caplog.records if '"auto"' in r.getMessage())
    assert said == (
        '"auto" in the configuration, and no framework to fill it in: gradient_accumulation_steps=1, '
        "optimizer.params.lr=0.001, optimizer.params.betas=[0.9, 0.999], gradient_clipping=1.0, "
        'fp16.enabled=false, scheduler.params.warmup_max_lr="its default"'
    )
    caplog.clear()
    engine()
    assert '"auto"' not in caplog.text


# Optimizers.


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "foreach": True}),
        ("Adafactor", {"lr": 0.01, "eps": [None, 1e-3], "d": 2}),
        ("NAdam", {"betas": [0.8, 0.9], "decoupled_weight_decay": True}),
        ("Rprop", {"etas": [0.4, 1.3]}),
    ],
)
def test_an_optimizer_of_torchs_by_its_name(name, params):
    e = engine({"optimizer": {"type": name, "params": params}})
    theirs = getattr(torch.optim, name)
    assert type(e.optimizer) is theirs
    kept = e._config.model_dump(exclude_unset=True)["optimizer"]["params"]
    assert kept == {k: v for k, v in params.items() if k != "foreach"}
    twin = engine(optimizer=lambda p: theirs(p, **{k: tuple(v) if k == "eps" else v for k, v in params.items()}))
    for both in (e, twin):
        train(both, batches(8))
    assert equal(state(e), state(twin))


@pytest.mark.parametrize("params", [{}, {"adam_w_mode": False}, {"weight_decay": 0.2}, {"amsgrad": True}])
def test_torch_adam_is_torchs_adam(params):
    """Its weight decay, too, where none is written."""
    e = engine({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True, **params}}})
    options = {k: v for k, v in params.items() if k != "adam_w_mode"}
    kind = torch.optim.Adam if params.get("adam_w_mode") is False else torch.optim.AdamW
    net = model()
    theirs = kind(net.parameters(), lr=0.1, **options)
    data = batches(8)
    train(e, data)
    for i in range(0, 8, 4):
        theirs.zero_grad()
        for x, y in data[i : i + 4]:
            (nn.functional.mse_loss(net(x), y) / 4).backward()
        theirs.step()
    for p, q in zip(state(e), net.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach())


def test_bias_correction_can_be_off():
    """Of Adam's moments, as BERT has it."""
    e = engine({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "bias_correction": False}}})
    twin = engine(optimizer=lambda p: deepfast.AdamW(p, lr=0.1, weight_decay=0.0, bias_correction=False))
    for both in (e, twin):
        train(both, batches(4))
    assert equal(state(e), state(twin))


# Precision.


def test_a_scale_that_is_too_high_begins_at_the_highest(caplog):
    caplog.set_level(logging.INFO, "deepfast")
    fp16 = {"enabled": True, "initial_scale_power": 32, "min_loss_scale": 0, "hysteresis": 1}
    e = engine({"fp16": fp16, "gradient_accumulation_steps": 1, "train_batch_size": 2})
    assert "fp16.initial_scale_power=32: the scale starts at 2**24" in caplog.text
    assert e.loss_scale == 2**24
    for _ in range(25):
        e.backward(e(torch.ones(2, 6)).sum() * float("inf"))
        e.step()
    assert e.loss_scale == 0.5  # below 1


@pytest.mark.parametrize("checked", [True, False])
def test_bf16_skips_what_is_not_finite(checked, tmp_path):
    bf16 = {"enabled": True} if checked else {"enabled": True, "check_grad_overflow": False}
    e = engine({"bf16": bf16, "gradient_accumulation_steps": 1, "train_batch_size": 2})
    before = state(e)
    e.backward(e(torch.ones(2, 6).bfloat16()).float().sum() * float("inf"))
    e.step()
    assert e.was_step_applied() is not checked
    assert (e.skipped_steps == 1) is checked
    assert equal(before, state(e)) is checked
    e.save_checkpoint(tmp_path)
    other = engine({"fp16": {"enabled": True, "initial_scale_power": 8}})
    other.load_checkpoint(tmp_path)
    assert other.loss_scale == 256  # bf16 has none to go on with


# Files.


def test_hjson(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n // batch\n "train_batch_size": 2, # two\n optimizer: {"type": "AdamW",},\n}')
    assert config.read_json(path) == {"train_batch_size": 2, "optimizer": {"type": "AdamW"}}


@pytest.mark.parametrize("end", ["}}}", ",}}}"])
def test_a_key_twice(tmp_path, end):
    path = tmp_path / "config.json"
    path.write_text('{"optimizer": {"params": {"lr": 0.01, "lr": 5.0' + end)
    with pytest.raises(ConfigError, match="the key 'lr' is there twice in one object"):
        config.read_json(path)


def test_a_configuration_in_base64():
    text = base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode()
    assert deepfast.initialize(model=model(), config=text)[0].train_batch_size() == 8
    with pytest.raises(ConfigError, match="no such file"):
        deepfast.initialize(model=model(), config="nowhere.json")
    with pytest.raises(ConfigError) as caught:
        deepfast.initialize(model=model(), config="x" * 5000)
    assert len(str(caught.value)) <= 200


def test_arguments_name_a_configuration_but_not_another(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    for name in ("deepspeed_config", "deepscale_config"):
        args = argparse.Namespace(**{name: str(path)})
        assert deepfast.initialize(args, model())[0].train_batch_size() == 8
        assert deepfast.initialize(args, model(), config=str(path))[0].train_batch_size() == 8
        with pytest.raises(ConfigError, match=r"args\.deepspeed_config, and another in config="):
            deepfast.initialize(args, model(), config=CONFIG)
    assert deepfast.initialize(argparse.Namespace(deepspeed_config=None), model(), config=CONFIG)
