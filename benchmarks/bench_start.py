"""What starting costs: compiling, importing, and fp16 training on a CPU beside fp32."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from conftest import Case, compare, report

import deepfast
from deepfast import gpt2

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **env: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def test_cold_build():
    """At most 15 s on 2 cores; DeepSpeed's CPU Adam alone takes 46 s on a machine like the first one measured."""
    code = (
        "import time, torch; s = time.perf_counter(); import deepfast.ops as o; "
        "assert o.LIBRARY, o.BUILD_ERROR; print(time.perf_counter() - s)"
    )
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            seconds.append(python(code, DEEPFAST_CACHE_DIR=cache))
    report({"title": "cold build", "s": round(statistics.median(seconds), 2)})


def test_imports():
    """`import deepfast`: at most 50 ms on top of torch; a cached `import deepfast.ops`: at most 100 ms more."""
    code = (
        "import time, torch; a = time.perf_counter(); import deepfast; b = time.perf_counter(); "
        "import deepfast.ops; c = time.perf_counter(); print({})"
    )
    rows = {}
    for name, expression in (("import deepfast", "b - a"), ("import deepfast.ops, cached", "c - b")):
        rows[name] = round(statistics.median(python(code.format(expression)) for _ in range(7)) * 1e3, 1)
    report({"title": "imports", "ms": rows})


def test_fp16_training_on_a_cpu():
    """At least half the tokens/s of fp32."""
    engines = {}
    for kind, section in (("fp32", {}), ("fp16", {"fp16": True})):
        torch.manual_seed(0)
        module = gpt2.model(gpt2.configuration("gpt2-tiny", 128)[0], None)
        config = {"train_batch_size": 16, "optimizer": {"params": {"lr": 1e-3}}, **section}
        engines[kind] = deepfast.initialize(model=module, config=config)[0]
    ids = torch.randint(0, 1024, (16, 128))

    def step(kind: str) -> None:
        engine = engines[kind]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    compare(
        "a training step of gpt2-tiny, 16 sequences of 128",
        [Case(kind, lambda kind=kind: step(kind), lambda: torch.zeros(1)) for kind in ("fp16", "fp32")],
        rounds=11,
    )
