"""Steps with inf or NaN in their gradients: what is said of them, and when an engine gives up."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from checks import failures, heard_of_ranks
from engines import CONFIG, batches, engine, equal, model, state
from told_ranks import CHECKS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepfast
from deepfast.engine import nonfinite
from deepfast.errors import LossScaleError, UserError

INF, NAN = float("inf"), float("nan")
ONE = {"train_batch_size": 2, "gradient_accumulation_steps": 1}


def fp16(**settings):
    return {**ONE, "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, **settings}}


def step(e, factor=1.0) -> None:
    for x, y in batches(e.gradient_accumulation_steps()):
        e.backward(nn.functional.mse_loss(e(x).float(), y) * factor)
        e.step()


@pytest.fixture
def said(caplog):
    """What was warned of since the last look."""

    def look() -> list[str]:
        lines = [r.getMessage() for r in caplog.records if r.name == "deepfast" and r.levelno >= logging.WARNING]
        caplog.clear()
        assert all("\n" not in line and len(line) <= 200 for line in lines)
        return lines

    return look


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_skipped_step_is_one_line(said, monkeypatch, accumulation):
    monkeypatch.setattr(nonfinite, "parameters", lambda _: pytest.fail("nobody has asked for names"))
    config = fp16() | {"train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    e = engine(config)
    said()
    for factor in (1.0, INF, NAN, 1.0, -INF):
        step(e, factor)
    assert said() == [
        "step 2 skipped: inf or NaN in the gradients; loss scale 16 -> 8",
        "step 3 skipped: inf or NaN in the gradients; loss scale 8 -> 4",
        "step 5 skipped: inf or NaN in the gradients; loss scale 4 -> 2",
    ]
    assert (e.skipped_steps, e.nonfinite_steps) == (3, 0)


def test_a_scale_that_stays_or_grows_is_told_as_it_is(said):
    """With hysteresis the first overflow leaves it alone; one that has just grown is the scale of the next backward."""
    e = engine(fp16(hysteresis=2, loss_scale_window=1))
    step(e, INF), step(e), step(e, INF)
    assert said() == [
        "step 1 skipped: inf or NaN in the gradients; loss scale 16 -> 16",
        "step 3 skipped: inf or NaN in the gradients; loss scale 32 -> 32",
    ]
    e = engine(fp16(initial_scale_power=24))
    step(e, INF)
    assert said() == ["step 1 skipped: inf or NaN in the gradients; loss scale 16777216 -> 8388608"]


def test_a_clean_step_waits_once():
    """For the verdict. Scales and names are read when a step was skipped."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            count.append(func) if func is torch.ops.aten._local_scalar_dense.default else None
            return func(*args, **(kwargs or {}))

    count: list[object] = []
    e = engine(fp16() | {"name_nonfinite": True})
    step(e)
    with Reads():
        step(e)
    assert len(count) == 1


def spoil(p: torch.Tensor, value: float) -> None:
    p.register_hook(lambda grad: torch.full_like(grad, value))


UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}


@pytest.mark.parametrize("config", [fp16(), ONE, {**ONE, **UNCHECKED}], ids=["fp16", "fp32", "bf16"])
def test_the_first_parameter_is_named_where_asked(said, config):
    """The first in the module, whatever the order of the optimizer's groups."""
    net = model()
    groups = [{"params": [net[2].bias]}, {"params": [net[2].weight, net[0].bias]}, {"params": [net[0].weight]}]
    e = deepfast.initialize(model=net, model_parameters=groups, config={**CONFIG, **config, "name_nonfinite": True})[0]
    said()
    spoil(net[2].bias, NAN), spoil(net[0].bias, INF)
    step(e)
    (line,) = said()
    assert ", first in '0.bias';" in line


def test_names_where_the_step_zeroes_gradients_or_nobody_knows_the_parameter(said):
    extra = nn.Parameter(torch.ones(()))
    net = model()
    optimizer = deepfast.AdamW([*net.parameters(), extra], reset_grad=True)
    e = deepfast.initialize(model=net, optimizer=optimizer, config={**CONFIG, **fp16(), "name_nonfinite": True})[0]
    e.backward(e(batches(1)[0][0]).sum() * INF), e.step()
    assert said() == ["step 1 skipped: inf or NaN in the gradients; loss scale 16 -> 8"]
    e = deepfast.initialize(
        model=net,
        optimizer=deepfast.AdamW([*net.parameters(), extra]),
        config={**CONFIG, **ONE, "name_nonfinite": True},
    )[0]
    said()
    e.backward(e(batches(1)[0][0]).sum() + extra * NAN), e.step()
    (line,) = said()
    assert "first in '#4'" in line


def overflowing(e, steps: int) -> int:
    """How many steps it takes until the error comes."""
    for count in range(steps):
        try:
            step(e, NAN)
        except LossScaleError as error:
            raised.append(error)
            return count + 1
    return -1


raised: list[LossScaleError] = []


@pytest.mark.parametrize(
    ("settings", "free"),
    [({}, 4), ({"min_loss_scale": 4.0}, 2), ({"loss_scale": 2.0}, 0), ({"loss_scale": 0.5}, 0)],
    ids=["dynamic", "minimum", "static", "below 1"],
)
def test_overflows_at_the_lowest_scale_are_an_error(settings, free, said):
    """Those above it, of which there are as many as halvings, are only told; one clean step, and it begins anew."""
    e = engine(fp16(max_skips_at_minimum=3, **settings))
    before = state(e)
    for _ in range(free + 2):
        step(e, NAN)
    step(e)
    assert e.was_step_applied()
    said()
    again = math.ceil(math.log2(e.loss_scale / settings.get("min_loss_scale", 1.0))) if free else 0
    assert overflowing(e, 10) == again + 3
    error = raised.pop()
    assert isinstance(error, (UserError, RuntimeError))
    assert error.exit_code == 1
    kind = "the minimum" if free else "static"
    assert f"3 skips in a row at loss scale {e.loss_scale:g} ({kind}): inf or NaN in 4 of 4 gradients (" in str(error)
    assert "('0.weight', '0.bias', '2.weight', ...): look at the data, try " in str(error)
    assert ("a dynamic one, bf16" in str(error)) == (not free)
    assert error.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert len(said()) == again + 3, "each is told"
    # The engine is whole: it counts that step, has let go of its gradients, and goes on if one wants it to.
    assert e.global_steps == e.micro_steps == free + 2 + 1 + again + 3
    assert e.skipped_steps == e.global_steps - 1
    assert all(p.grad is None for p in e.module.parameters())
    assert overflowing(e, 2) == -1
    assert overflowing(e, 2) == 1, "as many more, and it says so again"
    step(e)
    assert e.was_step_applied()
    assert not equal(before, state(e))


def test_the_default_is_twenty():
    assert overflowing(engine(fp16(initial_scale_power=0)), 50) == 20


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.AdamW])
def test_other_libraries_optimizers(said, optimizer):
    e = engine(fp16(max_skips_at_minimum=1, initial_scale_power=1) | {"name_nonfinite": True}, optimizer=optimizer)
    said()
    step(e, INF)
    assert said() == ["step 1 skipped: inf or NaN in the gradients, first in '0.weight'; loss scale 2 -> 1"]
    assert overflowing(e, 2) == 1


def test_long_names_still_make_one_line():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({f"{'layer' * 20}{i}": nn.Linear(2, 2) for i in range(500)})

        def forward(self, x):
            return sum(layer(x) for layer in self.inner.values())

    e = deepfast.initialize(model=Deep(), config={**CONFIG, **fp16(loss_scale=2.0**-20, max_skips_at_minimum=1)})[0]
    e.backward(e(torch.ones(2, 2)).sum() * NAN)
    with pytest.raises(LossScaleError) as caught:
        e.step()
    assert len(str(caught.value)) <= 200
    assert "in 1000 of 1000 gradients ('...layerlayer" in str(caught.value)
    assert "layer0.weight', ...)" in str(caught.value)
    assert len(caught.value.parameters) == 1000


@pytest.mark.parametrize("config", [{}, UNCHECKED, {"name_nonfinite": True}], ids=["fp32", "bf16", "named"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_a_loss_scale_they_propagate_and_are_counted(said, config, accumulation):
    e = engine({**config, "train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation})
    said()
    step(e)
    assert (said(), e.nonfinite_steps) == ([], 0)
    for _ in range(101):
        step(e, NAN)
    where = ", first in '0.weight'" if "name_nonfinite" in config else ""
    assert said() == [
        f"step {1 + count}: the gradients' norm is nan{where}; without loss scaling that reaches the weights "
        f"(such steps so far: {count})"
        for count in (1, 10, 100)
    ]
    assert (e.nonfinite_steps, e.skipped_steps, e.was_step_applied()) == (101, 0, True)
    assert all(p.isnan().all() for p in e.module.parameters()), "as in torch"


def test_bf16_skips_them_unless_told_otherwise(said):
    """As DeepSpeed does; there is no scale to speak of, and after many in a row an error."""
    e = engine({**ONE, "bf16": True, "name_nonfinite": True})
    step(e)
    before = state(e)
    said()
    step(e, NAN)
    assert said() == ["step 2 skipped: inf or NaN in the gradients, first in '0.weight'"]
    assert equal(before, state(e))
    assert (e.skipped_steps, e.was_step_applied(), e.nonfinite_steps, e.loss_scale) == (1, False, 0, 1.0)
    for _ in range(18):
        step(e, NAN)
    with pytest.raises(LossScaleError, match=r"^20 skips in a row: inf or NaN in 4 of 4 .*try fp32, a lower lr$"):
        step(e, NAN)
    assert equal(before, state(e))


class Copies:
    """A GPU that has copied a norm to the host when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.done, self.waited, self.recorded = 0, 0, 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", self._event)

    def _event(self) -> SimpleNamespace:
        nth = self.recorded = self.recorded + 1

        def synchronize():
            self.waited += nth > self.done
            self.done = max(self.done, nth)

        return SimpleNamespace(record=lambda _: None, query=lambda: nth <= self.done, synchronize=synchronize)

    def norm(self, value: float) -> SimpleNamespace:
        def to(device: str, non_blocking: bool) -> float:
            assert (device, non_blocking) == ("cpu", True)
            return value

        return SimpleNamespace(device=torch.device("cuda"), to=to)


def test_on_a_gpu_nobody_waits_until_it_is_asked(said, monkeypatch):
    gpu = Copies(monkeypatch)
    steps = nonfinite.NonFiniteSteps(name=False)
    for number, value in enumerate((1.0, NAN, 1.0, INF)):
        steps.heed(SimpleNamespace(global_steps=number), gpu.norm(value))
    assert said() == []
    gpu.done = 2
    steps.heed(SimpleNamespace(global_steps=4), gpu.norm(1.0))
    assert gpu.waited == 0
    assert [line[:36] for line in said()] == ["step 2: the gradients' norm is nan; "]
    assert steps.count() == 2
    assert gpu.waited == 3


def test_two_ranks(tmp_path):
    """Told by rank 0 alone, raised on all, at stages 0, 1 and 2; and what monitors do there."""
    said = heard_of_ranks(2, tmp_path, "told_ranks.py")
    assert said[0].keys() == CHECKS.keys()
    assert [text for check in CHECKS if (text := failures(said, check))] == []
