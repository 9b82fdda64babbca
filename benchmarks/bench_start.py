"""What starting costs: compiling, importing, and fp16 training on a CPU beside fp32.

Of a compilation or an import counts what a fresh process says it took, so the times are shown by a clock that is told.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import measure
import pytest
import torch

import deepfast
from deepfast.train import gpt2

ROOT = Path(__file__).resolve().parent.parent
TIMED = "import time, torch; {before}\nstart = time.perf_counter(); {what}; print('\\n', time.perf_counter() - start)"
# group -> contender -> what is done before, what is timed, rounds, package
FRESH = {
    "cold build of the CPU kernels": {
        "deepfast": ("", "import deepfast.ops as o; assert o.LIBRARY, o.BUILD_ERROR", 3, ""),
        "deepspeed": (
            "from deepspeed.ops.op_builder import CPUAdamBuilder",
            "CPUAdamBuilder().load(verbose=False)",
            1,
            "deepspeed",
        ),
    },
    "import, torch being there": {
        "deepfast": ("", "import deepfast", 7, ""),
        "deepspeed": ("", "import deepspeed", 3, "deepspeed"),
        "bitsandbytes": ("", "import bitsandbytes", 3, "bitsandbytes"),
        "torchao": ("", "import torchao.optim", 3, "torchao"),
    },
    "import of the compiled kernels": {"deepfast": ("import deepfast", "import deepfast.ops", 7, "")},
}


@pytest.mark.parametrize(
    ("group", "contender"),
    [pytest.param(group, name, id=f"{group.partition(',')[0]}-{name}") for group in FRESH for name in FRESH[group]],
)
@pytest.mark.benchmark(timer=measure.told)
def test_fresh_process(benchmark, tmp_path, group, contender):
    before, what, rounds, package = FRESH[group][contender]
    if package:
        pytest.importorskip(package, reason=f"pip install {package}")
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]  # ninja
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}
    turns = iter(range(rounds + 1))

    def fresh() -> None:
        if group.startswith("cold"):
            cache = str(tmp_path / str(next(turns)))
            env.update(DEEPFAST_CACHE_DIR=cache, TORCH_EXTENSIONS_DIR=cache)
        command = [sys.executable, "-c", TIMED.format(before=before, what=what)]
        done = subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        measure.tell(float(done.stdout.split()[-1]))

    benchmark.group = group
    benchmark.pedantic(fresh, rounds=rounds)


def training(kind: str) -> measure.Step:
    """A training step of gpt2-tiny, that returns the loss before it."""
    torch.manual_seed(0)
    module = gpt2.model(gpt2.configuration("gpt2-tiny", 128)[0], None)
    ids = torch.randint(0, 1024, (16, 128))
    if kind == "torch_fp32":
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0, fused=True)

        def step() -> float:
            optimizer.zero_grad()
            loss = module(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            return loss.item()

        return step
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0}}
    config = {"train_batch_size": 16, "optimizer": adamw, "fp16": kind == "deepfast"}
    engine = deepfast.initialize(model=module, config=config)[0]

    def step() -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


@pytest.mark.parametrize("contender", ["deepfast", "deepfast_fp32", "torch_fp32"])
def test_fp16_training_on_a_cpu(benchmark, contender):
    """At least half the tokens/s of fp32. Four steps have to learn as much as four of torch's in fp32."""
    learned = {}
    for kind in ("torch_fp32", contender):
        step = training(kind)
        first, *_, last = [step() for _ in range(4)]
        learned[kind] = first - last
    assert math.isclose(learned[contender], learned["torch_fp32"], rel_tol=0.05), learned
    benchmark.group = "training step of gpt2-tiny in fp16, 16 sequences of 128"
    measure.timed(benchmark, step, measure.streaming(1 << 20), 0, rounds=11)
