"""Small runs of ds_train.py: a folder with all that one needs, and what it has written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import TRAIN, run

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Small enough that most of a run is starting it.
SMALL = {
    "train_batch_size": 4,
    "train_micro_batch_size": 2,
    "train_sequence_length": 32,
    "fp16": True,
    "num_train_steps": 8,
    "num_warmup_steps": 2,
    "model_dir": "tiny",
    "dataset_dir": "text",
    "save_steps": 3,
    "sample_tokens": 8,
}


def furnished(place: Path) -> Path:
    (place / "text").mkdir()
    for name in ("argparse", "ast", "typing", "inspect"):
        shutil.copy(Path(os.__file__).parent / f"{name}.py", place / "text")
    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 320, "n_positions": 64}
    (place / "tiny").mkdir()
    (place / "tiny" / "config.json").write_text(json.dumps(shape))
    configure(place)
    return place


def configure(place: Path, **changes) -> None:
    config = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    (place / "config.json").write_text(json.dumps(config))


def train(place: Path, *options: object, launch: tuple = (sys.executable,), **env: str):
    env = {"OMP_NUM_THREADS": "1", **env}
    return run(*launch, TRAIN, "--config", "config.json", *options, cwd=place, env=env)


def metrics(place: Path, output: str = "output") -> list[dict]:
    lines = (place / output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]


def losses(place: Path, output: str = "output") -> list[float]:
    rows = metrics(place, output)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
