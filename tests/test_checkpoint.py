"""Checkpoints: what is resumed to the bit, what damage is named, and what is kept on disk."""

from __future__ import annotations

import argparse
import datetime
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from engines import CONFIG, batches, engine, equal, model, state, train
from torch import nn

import deepfast
from deepfast.engine import checkpoint, schedule
from deepfast.engine.plain import plain, restore


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
            found, exact = second.optimizer.get_master(q), first.optimizer.get_master(p)
            torch.testing.assert_close(found, exact, rtol=0, atol=2.0**-40)  # what fp16 may be off by


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


@pytest.mark.parametrize("name", ["model-0.safetensors", "optimizer-0.safetensors", "random-0.safetensors",
                                  "state.json", checkpoint.CHECKSUMS])  # fmt: skip
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_is_named_and_an_intact_one_offered(tmp_path, name, how):
    e = engine()
    train(e, batches(4))
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


def test_checkpoints_that_do_not_fit(tmp_path):
    e = engine()
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
    (tmp_path / "a" / "state.json").write_text(text.replace('"format": 2', '"format": 3'))
    (tmp_path / "a" / checkpoint.CHECKSUMS).write_text(run("sha256sum", "state.json", cwd=tmp_path / "a").stdout)
    with pytest.raises(checkpoint.CheckpointError, match="format 3 is not known"):
        e.load_checkpoint(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="name of a folder"):
        e.save_checkpoint(tmp_path, "../b")
    with pytest.raises(checkpoint.CheckpointError, match=r"no pickles.*not function"):
        e.save_checkpoint(tmp_path, "b", {"x": engine})
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
    back = restore(json.loads(json.dumps(plain(value))))
    assert torch.equal(back.pop("c"), value.pop("c"))
    assert back == value


@pytest.mark.parametrize(
    "value",
    [
        {1, "two"},
        b"\0\xff",
        Path("a/b"),
        argparse.Namespace(lr=1e-3, tags=("x",), out=Path("out")),
        datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
        torch.bfloat16,
        np.float32(1.5),
        np.float64(0.1),
        np.int64(-3),
        np.bool_(True),
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.random.default_rng(0).bit_generator.state,
        random.getstate(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_scripts_keep_comes_back_as_it_was(value, tmp_path):
    e = engine()
    e.save_checkpoint(tmp_path, client_state={"kept": value})
    back = e.load_checkpoint(tmp_path)[1]["kept"]
    assert type(back) is type(value)
    assert getattr(back, "dtype", None) == getattr(value, "dtype", None)
    assert np.array_equal(back, value) if isinstance(value, np.ndarray) else back == value


def test_saving_again_and_pruning(tmp_path):
    e = engine()
    for tag in ("a", "b", "c", "b"):
        (tmp_path / ".x.tmp").mkdir()  # left by one that was killed
        e.save_checkpoint(tmp_path, tag, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "latest"]
    e.load_checkpoint(tmp_path)
    # Killed between the two renames of saving the same tag again: the old one is found.
    (tmp_path / "b").rename(tmp_path / ".b.old")
    assert e.load_checkpoint(tmp_path)[0] == str(tmp_path / "b")


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    e = engine()
    train(e, batches(4))
    e.save_checkpoint(tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*.*")} == {".safetensors", ".json", ".sha256"}
    e.load_checkpoint(tmp_path)


def test_another_optimizers_checkpoint_is_refused(tmp_path):
    """Not even where each moment that it keeps is found in the file under that name: Lion's is not AdamW's."""

    class Own(torch.optim.Adamax):
        pass

    kinds = {name: {"optimizer": {"type": name, "params": {"lr": 0.01}}} for name in ("Adam", "AdamW", "Lion", "SGD")}
    kinds["Adam"]["optimizer"]["params"]["adam_w_mode"] = False  # else it is AdamW
    kinds |= {name: {"optimizer": {"type": name, "params": {"lr": 0.01}}} for name in ("RMSprop", "Adamax")}
    made = {name: deepfast.initialize(model=model(), config={**CONFIG, **kind})[0] for name, kind in kinds.items()}
    made["Own"] = deepfast.initialize(model=model(), optimizer=lambda p: Own(p, lr=0.01), config=CONFIG)[0]
    alike = {"AdamW": "Adam", "Own": "Adamax"}
    for saved, e in made.items():
        train(e, batches(4))
        e.save_checkpoint(tmp_path / saved)
    for saved in made:
        for own, e in made.items():
            before = state(e)
            if alike.get(saved, saved) == alike.get(own, own):
                e.load_checkpoint(tmp_path / saved)
                train(e, batches(4))
                continue
            with pytest.raises(checkpoint.CheckpointError, match=r"does not fit this optimizer: it is .*'s, not .*'s"):
                e.load_checkpoint(tmp_path / saved)
            assert equal(state(e), before)
            e.load_checkpoint(tmp_path / saved, load_optimizer_states=False)
