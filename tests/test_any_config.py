"""Whatever a configuration holds: it trains, or one short line says what is wrong with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import deepfast
from deepfast.engine.config import checks, named
from deepfast.engine.config.schema import SCHEDULERS
from deepfast.errors import UserError

KEYS = sorted({*checks._all_keys(), "optimizer.params.alpha", "optimizer.params.maximize", "zero_optimization.stagee"})
TYPES = [*named._torchs_names(), *named.OPTIMIZER_PARAMS, "adamw", "Lamb", "Muon", "OnebitAdam", "LBFGS", "Adamm"]
USUAL = {
    "optimizer.type": st.sampled_from(TYPES),
    "scheduler.type": st.sampled_from([*SCHEDULERS, "StepLR", "OneCycleLR"]),
    "optimizer.params.betas": st.just([0.9, 0.95]),
    "zero_optimization.stage": st.integers(0, 3),
    "fp16.enabled": st.booleans(),
    "bf16.enabled": st.booleans(),
    "scheduler.params.warmup_type": st.sampled_from(["log", "linear"]),
    "optimizer.params.state_dtype": st.sampled_from(["int8", "param", "bf16", {"exp_avg": "bf16"}]),
    "optimizer.params.master": st.sampled_from(["none", "fp32", "split"]),
}
NUMBERS = st.sampled_from([0, 1, 2, 0.5, 4.0, 1e-3, 1e-30, 1e30, 10**30, -1, -0.5, float("inf"), float("nan")])
WORDS = st.sampled_from(["auto", "", "x", "cpu", "1e-3", "true", "\n", "x" * 300]) | st.text(max_size=5)
ODD = st.one_of(
    NUMBERS,
    WORDS,
    st.booleans(),
    st.none(),
    st.lists(NUMBERS | WORDS, max_size=3),
    st.dictionaries(
        WORDS | st.sampled_from(["enabled", "device", "exp_avg"]), NUMBERS | WORDS | st.booleans(), max_size=2
    ),
)
VALUES = {key: st.one_of(*([USUAL[key]] * 3 if key in USUAL else [st.booleans(), NUMBERS]), ODD) for key in KEYS}


@st.composite
def configurations(draw):
    data: dict = {"train_micro_batch_size_per_gpu": 1}
    if draw(st.booleans()):
        data["optimizer"] = {"type": draw(USUAL["optimizer.type"]), "params": {"lr": 1e-3}}
    if draw(st.booleans()):
        kind = draw(USUAL["scheduler.type"])
        needs = {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0} if kind == "OneCycle" else {}
        data["scheduler"] = {
            "type": kind,
            "params": {"total_num_steps": 9, **needs} if kind.startswith("Warm") else needs,
        }
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        _set(data, key.split("."), draw(VALUES[key]))
    if draw(st.integers(0, 9)) == 0:
        data[draw(WORDS)] = draw(ODD)
    return data


def _set(data, path, value) -> None:
    if path[0] == "scheduler" and path[-1] != "type":
        data.setdefault("scheduler", {"type": "WarmupLR"})
    for part in path[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[path[-1]] = value


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """A monitor may be enabled, and writes to the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("written"))
        yield


# A machine may be slow.
@settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(configurations())
def test_it_trains_or_is_refused_in_one_line(config):
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    options = {} if "optimizer" in config else {"optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}
    try:
        engine = deepfast.initialize(model=module, config=config, **options)[0]
    except UserError as error:
        said = str(error)
    else:
        said = "it trains, or has no optimizer to train with"
        assert engine.optimizer is not None or config["optimizer"] is None
        if engine.optimizer is not None:
            _train(engine)
    assert said.isprintable()
    assert 0 < len(said) <= 200


def _train(engine) -> None:
    for _ in range(min(2 * engine.gradient_accumulation_steps(), 4)):
        x = torch.ones(1, 2, dtype=torch.float32 if engine.fp16_enabled() else engine.dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    assert engine.get_lr() == [pytest.approx(engine.get_lr()[0], nan_ok=True)]
