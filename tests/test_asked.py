"""What public DeepSpeed scripts ask of an engine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from engines import CONFIG, batches, engine, equal, model, state, train
from safetensors.torch import load_file
from torch import nn

import deepfast
from deepfast.engine import checkpoint
from deepfast.engine.loader import Anew


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model()
        self.flag = False
        self.config = {"hidden": 16}

    def forward(self, x):
        return self.net(x)

    def generate(self):
        return 7

    def gradient_checkpointing_enable(self):
        self.flag = True


def test_what_the_engine_lacks_is_the_modules():
    net = Net()
    e, *_ = deepfast.initialize(model=net, config=CONFIG)
    assert e.generate() == 7
    e.gradient_checkpointing_enable()
    assert net.flag
    assert e.flag
    assert e.net is net.net
    assert e.config is CONFIG  # as in DeepSpeed its own, in the words it was given
    assert not hasattr(e, "nowhere")
    with pytest.raises(AttributeError, match="neither the engine nor its module has 'nowhere'"):
        e.nowhere  # noqa: B018


def test_questions():
    e = engine({"bf16": True, "gradient_clipping": 0.5, "optimizer": {"type": "Adam", "params": {"lr": 0.25}}})
    assert (e.dp_world_size, e.mp_world_size, e.data_parallel_group) == (1, 1, None)
    assert (e.gradient_clipping(), e.get_lr(), e.get_mom()) == (0.5, [0.25], [(0.9, 0.999)])
    assert (e.optimizer_name(), e.scheduler_name(), e.get_type()) == ("Adam", None, [None])
    assert (e.loss_scale, e.loss_scale(), e.dynamic_loss_scale()) == (1.0, 1.0, False)
    assert (e.zero_optimization_partition_gradients(), e.zero_optimization_partition_weights()) == (False, False)
    assert e.is_first_weights_partition_group()
    assert e.client_optimizer is e.client_lr_scheduler is e.training_dataloader is None
    for call in (e.allreduce_gradients, e.empty_partition_cache, e.reload_states):
        assert call() is None
    e = engine(
        {
            "fp16": {"enabled": True, "initial_scale_power": 5},
            "optimizer": {"type": "SGD", "params": {"momentum": 0.5, "lr": 1.0}},
        }
    )
    assert (e.loss_scale, e.loss_scale(), e.dynamic_loss_scale(), e.get_mom()) == (32.0, 32.0, True, [0.5])
    assert (e.optimizer.cur_scale, e.optimizer.loss_scaler.cur_scale, e.optimizer.loss_scaler.loss_scale) == (32.0,) * 3
    assert not hasattr(deepfast.AdamW(model().parameters()), "cur_scale")


def test_what_does_nothing_says_so(caplog):
    engine().offload_states()
    assert "offloading is not built yet" in caplog.text


def test_loaders():
    data = [(torch.full((6,), float(i)), torch.zeros(3)) for i in range(9)]
    e, _, loader, _ = deepfast.initialize(model=model(), config=CONFIG, training_data=data)
    assert e.training_dataloader is loader
    first, second = ([x[:, 0].tolist() for x, _ in e.deepspeed_io(data)] for _ in range(2))
    assert first != second
    assert sorted(itertools.chain(*first)) == list(range(9))
    ranks = [Anew(data, num_replicas=2, rank=rank) for rank in range(2)]
    epochs = [[list(one) for one in ranks] for _ in range(2)]  # nobody calls set_epoch
    assert epochs[0] != epochs[1]
    assert all({*a, *b} == set(range(9)) for a, b in epochs)
    in_order = [x[:, 0].tolist() for x, _ in e.deepspeed_io(data, batch_size=4, route="eval")]
    assert in_order == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_the_weights_in_16_bits(tmp_path, name):
    e = engine({"bf16": True})
    e.module[0].bias.requires_grad_(False)
    assert e.save_16bit_model(tmp_path / "out", name)
    path = tmp_path / "out" / name
    saved = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert saved.keys() == e.module.state_dict().keys() == e._zero3_consolidated_16bit_state_dict().keys()
    for key, t in e.module.state_dict().items():
        assert saved[key].dtype == torch.bfloat16
        assert torch.equal(saved[key], t)
    assert "0.bias" not in e.module_state_dict(exclude_frozen_parameters=True)
    twin = engine({"bf16": True}, seed=3)
    twin.load_module_state_dict(saved)
    assert equal(state(twin), state(e))
    train(twin, batches(4))  # from the weights that were loaded, not from the masters before
    train(e, batches(4))
    for p, q in zip(twin.module.parameters(), e.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)


def test_compile():
    e = engine()
    x = torch.ones(2, 6)
    expected = e(x)
    e.compile(backend="eager", compile_kwargs={"dynamic": False})
    torch.testing.assert_close(e(x), expected)


def test_destroy(tmp_path):
    e = engine()
    train(e, batches(4))
    e.save_checkpoint(tmp_path, "a", wait=False)
    e.destroy()
    assert checkpoint.tags(tmp_path) == ["a"]
    before = state(e)
    assert e(torch.ones(2, 6)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="only runs forward"):
        e.step()
    assert equal(state(e), before)
    e.destroy()


# load_checkpoint's flags


def trained(tmp_path, **config):
    e = engine(
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_type": "linear"}}, **config}
    )
    train(e, batches(16))
    e.save_checkpoint(tmp_path, client_state={"epoch": 3})
    return e


def fresh(**config):
    return engine(
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_type": "linear"}}, **config},
        seed=7,
    )


def test_what_is_left_out_of_a_checkpoint(tmp_path):
    saved = trained(tmp_path)
    for flags, moments, steps, lr in (
        ({}, True, 4, saved.get_lr()),
        ({"load_optimizer_states": False}, False, 4, saved.get_lr()),
        ({"load_lr_scheduler_states": False}, True, 4, [0.0]),
        ({"load_module_only": True}, False, 0, [0.0]),
    ):
        e = fresh()
        path, client = e.load_checkpoint(tmp_path, **flags)
        assert path == str(tmp_path / "global_step4")
        assert client == {"epoch": 3}
        assert equal(state(e), state(saved)), flags
        assert bool(e.optimizer.state) == moments, flags
        assert (e.global_steps, e.micro_steps) == (steps, 4 * steps)
        assert e.get_lr() == lr, flags
        train(e, batches(4))
        assert e.global_steps == steps + 1


def test_only_the_weights_of_a_16_bit_run(tmp_path):
    """Its masters come along into an fp32 one; into a 16-bit one they begin anew."""
    saved = trained(tmp_path, bf16=True)
    e = fresh()
    e.load_checkpoint(tmp_path, load_module_only=True)
    for p, q in zip(e.module.parameters(), saved.module.parameters(), strict=True):
        assert torch.equal(p, saved.optimizer.get_master(q))
    e = fresh(bf16=True)
    e.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert equal(state(e), state(saved))


def test_a_module_that_fits_in_part(tmp_path, caplog):
    saved = trained(tmp_path)
    module = nn.Sequential(*model(7), nn.Linear(3, 3))
    e, *_ = deepfast.initialize(model=module, config=CONFIG)
    with pytest.raises(checkpoint.CheckpointError, match=r"another model: '3.bias' does not fit"):
        e.load_checkpoint(tmp_path, load_module_only=True)
    kept = module[3].weight.detach().clone()
    e.load_checkpoint(tmp_path, load_module_strict=False, load_module_only=True)
    assert "left alone: 3.bias, 3.weight" in caplog.text
    assert torch.equal(module[3].weight, kept)
    assert equal(state(e)[:4], state(saved))
    other, *_ = deepfast.initialize(model=nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 3)), config=CONFIG)
    with pytest.raises(checkpoint.CheckpointError, match=r"another model: '0.weight' does not fit"):
        other.load_checkpoint(tmp_path, load_module_strict=False, load_module_only=True)


def test_a_function_that_loads_the_module(tmp_path):
    saved = trained(tmp_path)
    e = fresh()

    def load(src, dst):
        dst.load_state_dict({name: t * 2 for name, t in src.items()})

    e.load_checkpoint(tmp_path, load_module_only=True, custom_load_fn=load)
    for p, q in zip(e.module.parameters(), saved.module.parameters(), strict=True):
        assert torch.equal(p, q * 2)


def test_nothing_there(tmp_path, caplog):
    e = engine()
    assert e.load_checkpoint(tmp_path) == (None, None)
    assert e.load_checkpoint(tmp_path / "nowhere", tag=7) == (None, None)
    assert caplog.text.count("holds no checkpoint") == 2
    e.save_checkpoint(tmp_path, "a")
    with pytest.raises(checkpoint.CheckpointError, match=r"no such checkpoint \(there are: a\)"):
        e.load_checkpoint(tmp_path, "b")


def test_save_checkpoints_own_flags(tmp_path):
    e = engine()
    e.module[0].bias.requires_grad_(False)
    e.save_checkpoint(tmp_path, "a")
    e.save_checkpoint(tmp_path, "b", None, False)
    assert sorted(checkpoint.tags(tmp_path)) == ["a", "b"]
    assert checkpoint.latest(tmp_path) == "a"
    assert not list(tmp_path.glob(".latest*"))
    e.save_checkpoint(tmp_path, "c", exclude_frozen_parameters=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"'0.bias' does not fit"):
        engine(seed=3).load_checkpoint(tmp_path, "c", load_module_only=True)
    other = engine(seed=3)
    kept = other.module[0].bias.detach().clone()
    other.load_checkpoint(tmp_path, "c", load_module_only=True, load_module_strict=False)
    assert torch.equal(other.module[0].bias, kept)
    assert torch.equal(other.module[0].weight, e.module[0].weight)


def test_a_scheduler_that_can_do_nothing_but_step(tmp_path):
    class Halving:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, epoch=1):
            self.optimizer.param_groups[0]["lr"] /= 2**epoch

    e = engine(lr_scheduler=Halving)
    train(e, batches(4))
    assert e.get_lr() == [0.005]
    e.save_checkpoint(tmp_path)
    e.load_checkpoint(tmp_path)
    for x, y in batches(4):
        e.backward(nn.functional.mse_loss(e(x), y))
        e.step(lr_kwargs={"epoch": 2})
    assert math.isclose(e.get_lr()[0], 0.005 / 4)
