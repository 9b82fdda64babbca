"""What an engine tells of its steps: events for monitors, a line now and then, timers."""

from __future__ import annotations

import logging
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from engines import batches, engine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepfast
from deepfast.engine import config as configuration
from deepfast.engine import timers
from deepfast.errors import ConfigError

ONE = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
DECAY = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}}


def files(place, **options):
    return {"enabled": True, "output_path": str(place), "job_name": "job", **options}


def step(e, factor=1.0) -> float:
    """Returns the mean of what backward was given."""
    losses = []
    for x, y in batches(e.gradient_accumulation_steps()):
        losses.append(nn.functional.mse_loss(e(x).float(), y) * factor)
        e.backward(losses[-1])
        e.step()
    return torch.stack(losses).mean().item()


def told(e, steps=3) -> dict[str, list[float]]:
    """What monitors should hold of so many steps, of which the second overflows."""
    rows = [
        {"train_loss": step(e, float("inf") if i == 1 else 1.0), "lr": e.get_lr()[0], "loss_scale": e.loss_scale,
         "grad_norm": e.get_global_grad_norm(), "skipped_steps": e.skipped_steps}
        for i in range(steps)
    ]  # fmt: skip
    return {name: [row[name] for row in rows] for name in rows[0]}


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5, nan_ok=True), name


def test_csv_files_lie_as_deepspeeds_do(tmp_path):
    config = {"train_batch_size": 8, "gradient_accumulation_steps": 4, **FP16, **DECAY, "csv_monitor": files(tmp_path)}
    e = engine(config)
    expected = told(e)
    e.monitor.write_events([("My/own name", 0.5, 7)])
    e.monitor.close()
    found = {}
    for path in (tmp_path / "job").iterdir():
        header, *rows = path.read_text().splitlines()
        name = path.stem.removeprefix("Train_Samples_")
        assert header == ("step,own name" if name == "My_own_name" else f"step,{name}")
        found[name] = [float(row.split(",")[1]) for row in rows]
        if name != "My_own_name":
            assert [row.split(",")[0] for row in rows] == ["8", "16", "24"], "samples"
    assert found.pop("My_own_name") == [0.5]
    same(found, expected)
    # A run that goes on writes no second header.
    step(engine(config))
    lines = (tmp_path / "job" / "Train_Samples_lr.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "8", "16", "24", "8"]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    e = engine({**ONE, **FP16, **DECAY, "tensorboard": files(tmp_path)})
    expected = told(e)
    events = EventAccumulator(str(tmp_path / "job"))
    events.Reload()  # each step is there at once
    found = {name: events.Scalars(f"Train/Samples/{name}") for name in expected}
    assert {tag.removeprefix("Train/Samples/") for tag in events.Tags()["scalars"]} == expected.keys()
    assert [event.step for event in found["lr"]] == [2, 4, 6]
    same({name: [event.value for event in values] for name, values in found.items()}, expected)
    e.monitor.close()


class FakeWandb(ModuleType):
    def __init__(self, failure: str = "") -> None:
        super().__init__("wandb")
        self.failure, self.calls, self.logged = failure, [], []

    def init(self, **options):
        self.calls.append(options)
        if self.failure:
            raise RuntimeError(self.failure)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((values, step)), finish=lambda: self.calls.append("finish")
        )


def test_wandb(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    e = engine({**ONE, "wandb": {"enabled": True, "group": "g", "team": "t", "project": "p"}})
    assert wandb.calls == [{"project": "p", "group": "g", "entity": "t"}]
    step(e), step(e)
    e.monitor.write_events([("a", 1.0, 10), ("b", 2.0, 10), ("a", 3.0, 11)])
    assert [at for _, at in wandb.logged] == [2, 4, 10, 11], "one call a step"
    assert wandb.logged[0][0].keys() == {
        f"Train/Samples/{n}" for n in ("train_loss", "lr", "grad_norm", "skipped_steps")
    }
    assert wandb.logged[2:] == [({"a": 1.0, "b": 2.0}, 10), ({"a": 3.0}, 11)]
    e.monitor.close()
    e.monitor.close()
    assert wandb.calls[1:] == ["finish"]


def refused(config) -> str:
    with pytest.raises(ConfigError) as caught:
        engine({**ONE, **config})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb.enabled: the package is not installed: pip install wandb" in refused({"wandb": {"enabled": True}})
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no key\nsecond line"))
    assert "wandb: no key (WANDB_MODE=offline" in refused({"wandb": {"enabled": True}})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in refused({"tensorboard": files(tmp_path)})
    (tmp_path / "file").write_text("")
    assert "csv_monitor: the folder" in refused({"csv_monitor": files(tmp_path / "file")})
    assert re.search("cannot be made: .*embedded null", refused({"csv_monitor": files("a\0b")}))


def test_the_sections_and_defaults_are_deepspeeds():
    bare = configuration.load({})
    assert (bare.steps_per_print, bare.wall_clock_breakdown) == (None, False)
    assert (bare.tensorboard.enabled, bare.csv_monitor.enabled, bare.wandb.enabled) == (False, False, False)
    assert (bare.csv_monitor.output_path, bare.csv_monitor.job_name, bare.wandb.project) == (
        "", "DeepSpeedJobName", "deepspeed")  # fmt: skip
    assert configuration.load({"steps_per_print": float("inf")}).steps_per_print is None, "accelerate's"
    with pytest.raises(ConfigError, match="did you mean 'output_path'"):
        configuration.load({"csv_monitor": {"output_pat": "x"}})
    with pytest.raises(ConfigError, match="steps_per_print=0"):
        configuration.load({"steps_per_print": 0})


class Clock:
    """Each look at it is a quarter of a second later than the one before."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timers, "time", self)

    def perf_counter(self) -> float:
        self.now += 0.25
        return self.now


def test_a_line_every_so_many_steps(capsys, monkeypatch):
    """By the clock a step takes 0.5 s: from where the last has ended to its own end, and from there on."""
    Clock(monkeypatch)
    e = engine({**ONE, **FP16, "steps_per_print": 2})
    assert e.steps_per_print() == 2
    losses = [step(e, float("inf") if i == 1 else 1.0) for i in range(5)]
    assert capsys.readouterr().out.splitlines() == [
        "step=2, skipped=1, lr=[0.01], loss=inf, samples/s=8, loss_scale=8",
        f"step=4, skipped=1, lr=[0.01], loss={losses[3]:.6g}, samples/s=8, loss_scale=8",
    ]
    e = engine({"steps_per_print": 1})
    loss = step(e)
    assert capsys.readouterr().out == f"step=1, skipped=0, lr=[0.01], loss={loss:.6g}, samples/s=32\n"
    e = engine(ONE)
    step(e)
    assert capsys.readouterr().out == "", "off by default"


def test_it_goes_to_the_log_where_that_shows_it(capsys, caplog):
    caplog.set_level(logging.INFO, "deepfast")
    e = engine({**ONE, "steps_per_print": 1})
    caplog.clear()
    step(e)
    (record,) = caplog.records
    assert record.getMessage().startswith("step=1, skipped=0, ")
    assert capsys.readouterr().out == ""


def test_learning_rates_of_many_groups(capsys):
    net = nn.ModuleList(nn.Linear(6, 3) for _ in range(8))
    net.forward = lambda x: sum(layer(x) for layer in net)
    rates = [0.5, 0.5, 0.5, 0.3, 0.4, 0.5, 0.6, 0.7]
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(net, rates, strict=True)]
    step(deepfast.initialize(model=net, optimizer=deepfast.SGD(groups), config={**ONE, "steps_per_print": 1})[0])
    assert "lr=[0.5, 0.3, 0.4, 0.6, ...], loss=" in capsys.readouterr().out


@pytest.mark.parametrize("accumulation", [1, 3])
def test_wall_clock_breakdown(capsys, monkeypatch, tmp_path, accumulation):
    """A phase takes 0.25 s by the clock: two looks at it, and none between."""
    Clock(monkeypatch)
    config = {"train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    e = engine({**config, "wall_clock_breakdown": True, "csv_monitor": files(tmp_path)})
    assert e.wall_clock_breakdown()
    assert e.get_wall_clock_timers() == {}
    step(e)
    for training in (False, True):
        e.train(training)
        e(batches(1)[0][0]) if not training else None  # an evaluation is not timed
    step(e)
    expected = {"fwd": 250.0 * accumulation, "bwd": 250.0 * accumulation, "step": 250.0}
    assert e.get_wall_clock_timers() == expected
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(", ms: " + ", ".join(f"{name}={ms:.2f}" for name, ms in expected.items()))
    for name, ms in zip(("forward", "backward", "step"), expected.values(), strict=True):
        rows = (tmp_path / "job" / f"Train_Samples_elapsed_time_ms_{name}.csv").read_text().splitlines()
        assert [float(row.split(",")[1]) for row in rows[1:]] == [ms, ms]


def test_with_steps_per_print_it_is_the_mean_of_those_steps(capsys, monkeypatch):
    clock = Clock(monkeypatch)

    class Slow(nn.Linear):
        def forward(self, x):
            clock.now += seconds.pop(0)
            return super().forward(x)

    seconds = [1.0, 3.0, 4.0, 8.0]
    config = {**ONE, "optimizer": {}, "steps_per_print": 2, "wall_clock_breakdown": True, "gradient_clipping": 1.0}
    e = deepfast.initialize(model=Slow(6, 3), config=config)[0]
    for _ in range(4):
        step(e)
    assert [line.split("ms: ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "fwd=2250.00", "fwd=6250.00"]  # fmt: skip


def test_a_forward_pass_that_fails_leaves_the_timer_usable():
    e = engine({**ONE, "wall_clock_breakdown": True})
    with pytest.raises(RuntimeError):
        e(torch.ones(1, 5))
    step(e)
    assert e.get_wall_clock_timers()["fwd"] > 0


def test_timers(monkeypatch):
    Clock(monkeypatch)
    e = engine(ONE)
    timer = e.timers("mine")
    assert e.timers("mine") is timer
    assert e.timers("other") is not timer
    assert timer.elapsed() == 0
    for _ in range(2):
        timer.start()
        timer.stop()
    assert timer.elapsed(reset=False) == 500
    timer.start()
    assert timer.elapsed() == 750
    timer.stop()  # it ran on
    assert timer.elapsed() == 250
    assert timer.elapsed() == 0
    with pytest.raises(RuntimeError, match="does not run"):
        timer.stop()
    timer.start()
    with pytest.raises(RuntimeError, match="runs already"):
        timer.start()
    timer.reset()
    timer.start()
    timer.stop()
    assert timer.elapsed() == 250


def test_timers_on_a_gpu_use_its_events(monkeypatch):
    """Which nobody waits for until they are read."""
    now, waited = iter([10.0, 17.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(now)

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timer = timers.Timer(torch.device("cuda"))
    timer.start(), timer.stop()
    assert waited == []
    assert timer.elapsed() == 7.0
    assert waited == [17.0]


def test_the_throughput_timer(monkeypatch):
    clock = Clock(monkeypatch)
    e = engine({"train_batch_size": 8, "gradient_accumulation_steps": 4})
    assert e.tput_timer.avg_samples_per_sec() == 0
    clock_at_step = []
    for i in range(5):
        step(e)
        clock_at_step.append(clock.now)
        clock.now += 10.0 if i == 0 else 1.0  # what a loop does between steps counts, but for the first two
    assert e.tput_timer.avg_samples_per_sec() == pytest.approx(3 * 8 / (3 * (1.0 + 0.25)))
    e.tput_timer.update_epoch_count()
    assert e.tput_timer.epoch_count == 1
    # By hand: what was before start() does not count, and a stop() without it is none.
    by_hand = timers.Throughput(4, start_step=0)
    by_hand.stop(global_step=True)
    by_hand.start()
    clock.now += 100.0
    by_hand.start()
    by_hand.stop()
    by_hand.start()
    by_hand.stop(global_step=True, report_speed=False)
    assert by_hand.avg_samples_per_sec() == 4 / 0.5
    assert (by_hand.recent(), by_hand.recent()) == (4 / 0.5, 0)
    third = timers.Throughput(4, start_step=1)
    for whole in (False, True, True):  # the first step has two parts
        third.start()
        clock.now += 0.0 if third.epoch_count else 10.0
        third.stop(global_step=whole)
        third.epoch_count += whole
    assert third.avg_samples_per_sec() == 4 / 0.25


def test_what_nobody_wants_is_not_read():
    """Without monitors and lines the loss stays on the device: one read a step is the norm's, on a CPU."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            count.append(func) if func is torch.ops.aten._local_scalar_dense.default else None
            return func(*args, **(kwargs or {}))

    for config, reads in ((ONE, 1), ({**ONE, "steps_per_print": 2}, 1), ({**ONE, "steps_per_print": 1}, 2)):
        count: list[object] = []
        e = engine(config)
        data = batches(1)[0]
        loss = nn.functional.mse_loss(e(data[0]), data[1])
        with Reads():
            e.backward(loss)
            assert (e._progress._loss is None) == (config is ONE)
            e.step()
        assert len(count) == reads, config
