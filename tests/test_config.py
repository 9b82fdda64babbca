"""The schema: two spellings, clear refusals."""

from __future__ import annotations

import json
import logging

import pytest
from conftest import ROOT

from deepfast.engine import config
from deepfast.engine.config import named
from deepfast.errors import ConfigError
from deepfast.optimizers import OPTIMIZERS
from deepfast.train.defaults import trainer_defaults

SEED = json.loads((ROOT / "examples" / "config.json").read_text())


def test_the_eleven_keys():
    loaded = config.load(SEED)
    config.resolve_batch(loaded, 1, one_process=True)
    assert loaded.batch_triple() == (32, 8, 4)
    assert loaded.train_loss_scale == 0.5
    assert loaded.fp16
    assert loaded.fp16.enabled


def test_deepspeeds_spelling_says_the_same():
    loaded = config.load(
        {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 4,
            "fp16": {"enabled": True, "loss_scale": 0.5},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 1000, "total_num_steps": 10000}},
            "zero_optimization": {"stage": 0, "overlap_comm": True},
            "train_batch_size": "auto",
        }
    )
    config.resolve_batch(loaded, 1)
    assert loaded.batch_triple() == (32, 8, 4)
    assert (loaded.train_loss_scale, loaded.num_warmup_steps, loaded.num_train_steps) == (0.5, 1000, 10000)


def test_both_spellings_may_agree():
    loaded = config.load({"train_loss_scale": 0.5, "fp16": {"loss_scale": 0.5}, "train_micro_batch_size": 8,
                          "train_micro_batch_size_per_gpu": 8})  # fmt: skip
    assert loaded.train_loss_scale == 0.5


BAD = [
    ({"train_batch_sizes": 32}, "'train_batch_sizes': unknown key: did you mean 'train_batch_size'?"),
    ({"fp16": {"loss_scal": 1.0}}, "'fp16.loss_scal': unknown key: did you mean 'loss_scale'?"),
    (
        {"optimizer": {"params": {"learning_rate": 1.0}}},
        "'optimizer.params.learning_rate': unknown key: `python -m deepfast keys` lists what is known",
    ),
    ({"zero_optimization": {"stagee": 1}}, "'zero_optimization.stagee': unknown key: did you mean 'stage'?"),
    ({"train_batch_size": "32"}, 'train_batch_size="32": it must be an integer'),
    ({"train_batch_size": 32.5}, "train_batch_size=32.5: it must be an integer"),
    ({"train_batch_size": True}, "train_batch_size=true: it must be an integer"),
    ({"fp16": "yes"}, "fp16='yes': it must be true, false or an object"),
    ({"optimizer": 3}, "optimizer=3: it must be an object"),
    ({"output_dir": 3}, "output_dir=3: it must be a string"),
    ({"train_micro_batch_size": 0}, "train_micro_batch_size=0: it must be greater than 0"),
    ({"train_micro_batch_size_per_gpu": -8}, "train_micro_batch_size_per_gpu=-8: it must be greater than 0"),
    ({"num_train_steps": -1}, "num_train_steps=-1: it must be greater than 0"),
    ({"train_loss_scale": -0.5}, "train_loss_scale=-0.5: it must be greater than or equal to 0"),
    ({"optimizer": {"params": {"lr": -1}}}, "optimizer.params.lr=-1: it must be greater than or equal to 0"),
    ({"optimizer": {"params": {"lr": "1e-3"}}}, 'optimizer.params.lr="1e-3": it must be a number'),
    ({"optimizer": {"params": {"betas": [0.9, 1.0]}}}, "betas.1=1.0 must lie in [0, 1)"),
    (
        {"optimizer": {"params": {"momentum": 0.9}}},
        "optimizer.params.momentum: AdamW has none: it takes lr, betas, eps",
    ),
    ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, "optimizer.params.betas: SGD has none"),
    ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "nesterov=true needs a momentum"),
    ({"scheduler": {}}, "scheduler.type: it is required"),
    ({"train_loss_scale": 0.5, "fp16": {"loss_scale": 2.0}}, "train_loss_scale=0.5 contradicts fp16.loss_scale=2.0"),
    ({"train_micro_batch_size": 4, "train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size=4 contradicts"),
    ({"fp16": True, "bf16": True}, "fp16 and bf16 are both enabled"),
    ({"zzz": 1}, "'zzz': unknown key: `python -m deepfast keys` lists what is known"),
    ({"stage": 1}, "'stage': unknown key: did you mean 'zero_optimization.stage'?"),
    ({"optimizer": {"eps": 1.0}}, "'optimizer.eps': unknown key: did you mean 'optimizer.params.eps'?"),
    ({"optimizer": {"zzz": 1.0}}, "'optimizer.zzz': unknown key: known are: legacy_fusion, params, type"),
    ({"a\nb": 1}, "'a\\nb': unknown key"),
    ({"optimizer": {"params": {"lr": float("inf")}}}, "it must be a finite number"),
    ({"train_loss_scale": 1e300}, "train_loss_scale=1e+300: it must be less than"),
    ({"train_loss_scale": 1e-50}, "too small for fp32"),
    ({"seed": 10**30}, "seed="),
    ({"output_dir": "a\0b"}, "output_dir: holds a NUL"),
    ({"output_dir": ""}, 'output_dir="": it should have at least 1 character'),
    ({"fp16": {"enabled": True, "hysteresis": 10**9}}, "fp16.hysteresis=1000000000: it must be less than"),
    (
        {"fp16": {"fp16_master_weights_and_grads": True}},
        "fp16.fp16_master_weights_and_grads: is not supported, and cannot be ignored: masters are fp32",
    ),
    ({"moe": {"enabled": True}}, "moe: is not supported, and cannot be ignored: mixture of experts"),
    ({"bf16": True, "bfloat16": {"enabled": False}}, "bfloat16 contradicts bf16: keep one of them"),
    ({1: 2}, "'1': a key must be a string"),
    ({"fp16": {"hysteresis": {"a": [1] * 100}}}, "fp16.hysteresis=an object: it must be an integer"),
    ({"x" * 500: 1}, "unknown key"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[m.split(":")[0][:40] for _, m in BAD])
def test_bad_values_are_refused_in_one_line(data, message):
    with pytest.raises(ConfigError) as caught:
        config.load(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    ("triple", "world", "result"),
    [
        ((32, 8, 4), 1, (32, 8, 4)),
        ((32, 8, None), 1, (32, 8, 4)),
        ((32, None, 4), 1, (32, 8, 4)),
        ((None, 8, 4), 1, (32, 8, 4)),
        ((32, None, None), 1, (32, 32, 1)),
        ((None, 8, None), 2, (16, 8, 1)),
        ((32, 8, None), 2, (32, 8, 2)),
    ],
)
def test_any_two_give_the_third(triple, world, result):
    names = ("train_batch_size", "train_micro_batch_size", "gradient_accumulation_steps")
    loaded = config.load({k: v for k, v in zip(names, triple, strict=True) if v})
    config.resolve_batch(loaded, world)
    assert loaded.batch_triple() == result


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_trainer_divides_the_accumulation_among_the_ranks(world, caplog):
    caplog.set_level(logging.INFO, "deepfast")
    loaded = config.load(SEED)
    config.resolve_batch(loaded, world, one_process=True)
    assert loaded.batch_triple() == (32, 8, 4 // world)
    assert len(caplog.records) == (world > 1)


def test_triples_that_do_not_multiply():
    for triple, world, one_process, message in (
        ((32, 8, 3), 1, False, "8 x gradient_accumulation_steps 3 x ranks 1 = 24"),
        ((32, 8, 4), 2, False, "= 64"),
        ((32, 8, 4), 3, True, "gradient_accumulation_steps=4 cannot be divided among 3 ranks"),
        ((30, 8, None), 1, False, "train_batch_size=30 cannot be divided by micro-batch 8 x ranks 1 = 8"),
        ((None, None, 4), 1, False, "train_batch_size or train_micro_batch_size is missing"),
    ):
        names = ("train_batch_size", "train_micro_batch_size", "gradient_accumulation_steps")
        loaded = config.load({k: v for k, v in zip(names, triple, strict=True) if v})
        with pytest.raises(ConfigError) as caught:
            config.resolve_batch(loaded, world, one_process=one_process)
        assert message in str(caught.value)


def test_keys_without_effect_are_logged_once(caplog):
    caplog.set_level(logging.INFO, "deepfast")
    config.load({"dump_state": True, "zero_optimization": {"stage": 1, "overlap_comm": True}})
    assert [r.getMessage() for r in caplog.records] == [
        "configuration keys without effect here: dump_state, zero_optimization.overlap_comm"
    ]


def test_json_faults_have_a_place(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="no such file"):
        config.read_json(path)
    path.write_text('{\n "a": 1,\n "b" 2\n}')
    with pytest.raises(ConfigError, match="line 3, column 6"):
        config.read_json(path)
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            config.read_json(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_json("a\0b")
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="object was expected, got a list"):
        config.read_json(path)


def test_sections_are_off_unless_enabled_as_in_deepspeed(caplog):
    caplog.set_level(logging.INFO, "deepfast")
    loaded = config.load({"fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}})
    assert not loaded.fp16.enabled
    assert not loaded.bf16.enabled
    assert "fp16: a section without" in caplog.text
    assert config.load({"fp16": {"enabled": True, "fp16_master_weights_and_grads": False}}).fp16.enabled
    assert config.load({"fp16": True}).fp16.enabled
    assert config.load({"train_loss_scale": None, "fp16": {"loss_scale": 2.0}}).train_loss_scale == 2.0


def test_a_warm_up_longer_than_the_run_is_a_warning(caplog):
    trainer_defaults(config.load({"num_train_steps": 10, "num_warmup_steps": 11}))
    assert "never reaches its peak" in caplog.text


def test_trainer_defaults_fill_only_what_is_missing():
    filled = trainer_defaults(config.load({"optimizer": {"params": {"lr": 0.1, "weight_decay": 0.0}}}))
    params = filled.optimizer.params
    assert (params.lr, params.betas, params.weight_decay) == (0.1, (0.9, 0.95), 0.0)
    assert filled.gradient_clipping == 1.0
    assert filled.scheduler.type == "WarmupCosine"
    assert trainer_defaults(config.load({"gradient_clipping": 0.0})).gradient_clipping == 0.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_a_configuration_leaves_open_is_deepspeeds_default(kind):
    """Which are the optimizer's own, but for weight decay, and what DeepSpeed's classes have of their own."""
    theirs = {"Lion": {"betas": (0.9, 0.999)}, "LAMB": {"eps": 1e-8}}.get(kind, {})
    section = config.load({"train_batch_size": 1, "optimizer": {"type": kind, "params": {"lr": 0.5}}}).optimizer
    assert named.chosen(section)[1] == {"lr": 0.5, "weight_decay": 0.0, **theirs}
