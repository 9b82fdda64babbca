"""What is given wrongly is answered in one line that says what is wrong: no error from deep inside, and no silence."""

from __future__ import annotations

import logging
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepfast
from deepfast.engine.checkpoint import CheckpointError
from deepfast.errors import ConfigError

CONFIG = {"train_batch_size": 2, "gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def parameter(**options) -> nn.Parameter:
    return nn.Parameter(torch.ones(4, **options))


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


MADE = {
    "a learning rate in words": ("AdamW", {"lr": "1e-3"}, "lr must be a number, got '1e-3' \\(str\\)"),
    "no learning rate": ("SGD", {"lr": None}, "lr must be a number, got None"),
    "learning rates": ("Lion", {"lr": [1e-3]}, "lr must be a number, got \\[0.001\\]"),
    "one beta": ("AdamW", {"betas": 0.9}, "betas must be a pair of numbers, got 0.9"),
    "betas in words": ("Lion", {"betas": ("a", "b")}, "betas\\[0\\] must be a number, got 'a'"),
    "letters": ("Adam", {"betas": "ab"}, "betas must be a pair of numbers, got 'ab'"),
    "eps in words": ("LAMB", {"eps": "x"}, "eps must be a number"),
    "one bound": ("LAMB", {"phi": 1.0}, "phi must be a pair of numbers"),
    "a bound alone": ("LAMB", {"phi": (1.0,)}, "Invalid phi: \\(1.0,\\), there must be two"),
    "no bounds": ("LAMB", {"phi": ()}, "Invalid phi: \\(\\), there must be two"),
    "three bounds": ("LAMB", {"phi": [0, 1, 2]}, "Invalid phi: \\[0, 1, 2\\], there must be two"),
    "three betas": ("LAMB", {"betas": (0.9, 0.9, 0.9)}, "Invalid betas: .*, there must be two"),
    "momentum": ("SGD", {"momentum": "x"}, "momentum must be a number"),
    "dampening": ("SGD", {"momentum": 0.9, "dampening": "x"}, "dampening must be a number"),
    "decay": ("Adagrad", {"lr_decay": "x"}, "lr_decay must be a number"),
    "a list of masters": ("AdamW", {"master": ["fp32"]}, "master=\\['fp32'\\] is not known: choose one of"),
    "a dtype": ("AdamW", {"state_dtype": torch.bfloat16}, "state_dtype=torch.bfloat16 is not known: choose one of"),
    "a list of forms": ("AdamW", {"state_dtype": {"exp_avg": ["bf16"]}}, "is not known: choose one of"),
    "a seed in words": ("AdamW", {"seed": "x"}, "seed must be an integer, got 'x'"),
    "half a seed": ("AdamW", {"seed": 0.5}, "seed must be an integer, got 0.5"),
    "a norm in words": ("AdamW", {"max_grad_norm": "1"}, "max_grad_norm must be a number or None, got '1'"),
    "yes and no": ("AdamW", {"reset_grad": "no"}, "reset_grad must be True or False, got 'no'"),
}


@pytest.mark.parametrize("case", MADE)
def test_an_optimizer_names_what_cannot_be(case):
    name, options, said = MADE[case]
    with pytest.raises((TypeError, ValueError), match=said) as error:
        getattr(deepfast, name)([parameter()], **options)
    assert one_line(error)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (nn.Linear(2, 2), "not Linear: give its parameters\\(\\)"),
        (nn.Sequential(nn.Linear(2, 2)), "not Sequential: give its parameters\\(\\)"),
        (None, "not NoneType"),
        ({"params": [parameter()]}, "or a list of groups of them, not dict"),
    ],
)
def test_an_optimizer_takes_parameters(given, said):
    with pytest.raises(TypeError, match=said):
        deepfast.AdamW(given)


def test_a_list_of_parameters_of_torchs_is_one():
    assert deepfast.AdamW(nn.ParameterList([parameter()])).param_groups[0]["params"]


def test_the_base_of_all_steps_nothing():
    with pytest.raises(NotImplementedError, match="Optimizer has no step of its own: take AdamW"):
        deepfast.optim.Optimizer([parameter()], {"lr": 0.1})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("master", "x", "master='x' is not known"),
        ("rounding", "stochastic", "give master='none', too"),
        ("max_grad_norm", "x", "must be a number or None"),
        ("max_grad_norm", -1.0, "must be positive"),
        ("state_dtype", {"x": "bf16"}, "there is no moment 'x'; AdamW keeps exp_avg, exp_avg_sq"),
        ("backend", "x", "unknown backend 'x'"),
    ],
)
def test_an_option_that_is_set_later_is_looked_at_then(name, value, said):
    optimizer = deepfast.AdamW([parameter()])
    before = dict(optimizer.defaults)
    with pytest.raises((TypeError, ValueError), match=said):
        setattr(optimizer, name, value)
    assert optimizer.defaults == before


@pytest.mark.parametrize(("name", "value"), [("lr", "x"), ("lr", None), ("betas", 0.9)])
def test_a_group_that_was_changed_is_named_by_the_step(name, value):
    p = parameter()
    optimizer = deepfast.AdamW([p])
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with pytest.raises(TypeError, match=f"{name} must be a (pair of )?number"):
        optimizer.step()


def test_a_group_without_parameters_is_none():
    with pytest.raises(ValueError, match="a parameter group needs 'params', got lr"):
        deepfast.AdamW([{"lr": 0.1}])


def test_masters_are_those_of_the_optimizers_parameters():
    p = parameter(dtype=torch.bfloat16)
    optimizer = deepfast.AdamW([p])
    assert optimizer.get_master(p).dtype == torch.float32
    for wrong in (parameter(), "weight"):
        with pytest.raises(ValueError, match="is not in the optimizer's groups"):
            optimizer.get_master(wrong)
        with pytest.raises(ValueError, match="is not in the optimizer's groups"):
            optimizer.set_master(wrong, torch.ones(4))
    with pytest.raises(ValueError, match=r"shape \(4,\) and a value of \(5,\)"):
        optimizer.set_master(p, torch.ones(5))


@pytest.mark.parametrize("given", [None, {}, {"weight": 1}, [1]])
def test_a_state_is_an_optimizers(given):
    with pytest.raises((TypeError, ValueError), match=r"takes the state_dict\(\) of an optimizer") as error:
        deepfast.AdamW([parameter()]).load_state_dict(given)
    assert one_line(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_scale": "x"}, "init_scale must be a number, got 'x'"),
        ({"growth_interval": None}, "growth_interval must be a number"),
        ({"hysteresis": "2"}, "hysteresis must be a number"),
        ({"max_scale": "x"}, "max_scale must be a number"),
        ({"dynamic": "false"}, "dynamic must be True or False"),
        ({"enabled": "no"}, "enabled must be True or False"),
        ({"device": 65536.0}, "device must be a torch.device or its name, got 65536.0"),
    ],
)
def test_a_scaler_names_what_cannot_be(options, said):
    with pytest.raises(TypeError, match=said):
        deepfast.LossScaler(**options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.step(nn.Linear(2, 2)), "steps an optimizer, not Linear"),
        (lambda s: s.unscale_(None), "steps an optimizer, not NoneType"),
        (lambda s: s.update("x"), "new_scale must be a number"),
        (lambda s: s.update(torch.ones(2)), r"new_scale must be a number, got a tensor of shape \(2,\)"),
        (lambda s: s.set_growth_factor("x"), "growth_factor must be a number"),
        (lambda s: s.set_backoff_factor("x"), "backoff_factor must be a number"),
        (lambda s: s.set_growth_interval("x"), "growth_interval must be a number"),
        (lambda s: s.scale("loss"), "outputs must be a tensor"),
        (lambda s: s.load_state_dict({"scale": 1.0}), "no '_growth_tracker' in the state"),
    ],
)
def test_a_scaler_that_is_there_names_it_too(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call(deepfast.LossScaler())


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_communicator_names_what_cannot_be():
    with pytest.raises(TypeError, match="takes a process group, got 'world'"):
        deepfast.comm.Communicator("world")
    with pytest.raises(TypeError, match=r"timeout must be a datetime.timedelta, got 3"):
        deepfast.comm.Communicator(timeout=3)
    t = torch.ones(4)
    with deepfast.comm.Communicator(timeout=timedelta(seconds=60)) as comm:
        for call in (
            lambda: comm.all_reduce_([1.0]),
            lambda: comm.all_reduce([1.0]),
            lambda: comm.all_gather([t], t),
            lambda: comm.reduce_scatter(t, [t]),
        ):
            with pytest.raises(TypeError, match="collectives take tensors, not list"):
                call()
        with pytest.raises(TypeError, match="on a CPU or a GPU, not on meta"):
            comm.all_reduce_(t.to("meta"))
        for wrong in (("x",), ((2, 2),), (4, "fp32")):
            with pytest.raises(TypeError, match=r"empty\(\) takes a number of elements and a dtype"):
                comm.empty(*wrong)
        assert torch.equal(comm.all_reduce_(t), torch.ones(4))
    for call in (lambda: comm.all_reduce_(t), lambda: comm.empty(4)):
        with pytest.raises(RuntimeError, match="the communicator is closed"):
            call()


def engine(**given):
    return deepfast.initialize(**{"model": nn.Linear(4, 2), "config": CONFIG, **given})[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "gpt2"}, "model is a torch.nn.Module, not 'gpt2'"),
        ({"model": nn.Linear}, "model is a torch.nn.Module, not <class"),
        ({"config": ""}, "no configuration: pass config="),
        ({"config": "missing.json"}, "missing.json: no such file"),
        ({"optimizer": "AdamW"}, "optimizer= takes an optimizer, or a function that makes one, not str"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler= takes a scheduler, or a function that makes one, not str"),
        ({"training_data": 3}, "training data is a dataset .*, not int"),
        ({"training_data": []}, "training data is empty: list of length 0"),
    ],
)
def test_initialize_names_what_cannot_be(given, said):
    with pytest.raises((TypeError, ValueError, ConfigError), match=said) as error:
        engine(**given)
    assert one_line(error)


def test_an_engine_is_made_by_initialize():
    with pytest.raises(TypeError, match=r"made by deepfast.initialize\(\)"):
        deepfast.Engine(nn.Linear(4, 2), None, None, CONFIG, torch.device("cpu"))


def test_an_optimizer_of_another_model_is_told_of(caplog):
    with caplog.at_level(logging.WARNING):
        engine(optimizer=deepfast.AdamW(nn.Linear(4, 2).parameters()))
    assert "the optimizer has no parameter of the model" in caplog.text
    caplog.clear()
    model = nn.Linear(4, 2)
    with caplog.at_level(logging.WARNING):
        engine(model=model, optimizer=deepfast.AdamW([model.bias]))
    assert "no parameter of the model" not in caplog.text


def loss(e):
    return e(torch.ones(2, 4)).sum()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda e: e.backward(1.0), "a loss is a tensor, not float"),
        (lambda e: e.backward({"loss": loss(e)}), "a loss is a tensor, not dict"),
        (lambda e: e.backward(e(torch.ones(2, 4))), r"a scalar, not of shape \(2, 2\): take its mean"),
        (lambda e: e.backward(loss(e).detach()), "the loss has no graph"),
        (lambda e: e.backward(loss(e), "x"), "a weight is a number, not a str"),
        (lambda e: e.backward(loss(e), -1e-30), "a weight must not be negative, got -1e-30"),
        (lambda e: e.backward(loss(e), torch.tensor(-1)), "a weight must not be negative, got -1.0"),
        (lambda e: e.backward(loss(e), math.nan), "a weight must not be negative, got nan"),
        (lambda e: e.step(), r"there was no backward\(\)"),
        (lambda e: e.set_train_batch_size("x"), "train_batch_size must be an integer"),
        (lambda e: e.set_train_micro_batch_size(1.5), "micro_batch_size must be an integer"),
        (lambda e: (e.destroy(), e.step()), r"after destroy\(\) the engine only runs forward"),
    ],
)
def test_an_engine_names_what_cannot_be(call, said):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=said) as error:
        call(engine())
    assert one_line(error)


def test_an_engine_goes_on_after_a_wrong_loss():
    e = engine()
    with pytest.raises(TypeError):
        e.backward(1.0)
    e.backward(loss(e))
    e.step()
    assert e.global_steps == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0}, "keep is how many checkpoints are left, at least 1, got 0"),
        ({"keep": "x"}, "keep is how many"),
        ({"timeout": "x"}, "timeout is a number of seconds"),
    ],
)
def test_a_checkpoint_is_not_begun_with_what_cannot_be(tmp_path, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        engine().save_checkpoint(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_checkpoint_is_told_of(tmp_path, caplog):
    e = engine()
    e.save_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert e.load_checkpoint(tmp_path / "global_step0") == (None, None)
    assert f"it is one itself: load_checkpoint({str(tmp_path)!r}, tag='global_step0')" in caplog.text
    caplog.clear()
    assert e.load_checkpoint(tmp_path / "nothing") == (None, None)
    assert "it is one itself" not in caplog.text


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
def test_weights_that_cannot_be_written_are_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{name}: cannot be written"):
        engine().save_16bit_model(tmp_path / "file", name)
