"""Run by test_zero.py: what some ranks save in shards, others read, and go on with the very same bits.

    torchrun ... zero_checkpoint.py PLACE save|load STAGE

Twelve micro-batches a step, on however many ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from checks import run_checks
from zero_ranks import RANK, SIZE, Net, kept, same, train

import deepfast

OPTIMIZERS = {
    "AdamW": {"amsgrad": True},
    "LAMB": {},
    "SGD": {"momentum": 0.9},
    "Adam": {"state_dtype": "int8"},
}


def engine_of(name, stage):
    return deepfast.initialize(
        model=Net(),
        optimizer=lambda params: getattr(deepfast, name)(params, lr=0.01, **OPTIMIZERS[name]),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 12 // SIZE,
            "gradient_clipping": 0.5,
            "fp16": {"enabled": True, "initial_scale_power": 8},
            "zero_optimization": {"stage": stage},
        },
    )[0]


def save(name, stage):
    engine = engine_of(name, stage)
    for step in (0, 1):
        train(engine, step, SIZE)
    then = kept(engine)
    engine.save_checkpoint(PLACE / name, "two", {"so": "far"}, wait=False)
    train(engine, 2, SIZE)  # while it is written
    after = kept(engine)
    engine.wait_for_checkpoint()
    if RANK == 0:
        torch.save((then, after), PLACE / f"{name}.pt")


def load(name, stage):
    engine = engine_of(name, stage)
    step, engine.optimizer.step = engine.optimizer.step, None
    assert engine.load_checkpoint(PLACE / name)[1] == {"so": "far"}
    engine.optimizer.step = step
    then, after = torch.load(PLACE / f"{name}.pt")
    found = kept_after_loading(engine)
    same(found, {key: then[key] for key in found})
    counts = [int(state["step"]) for state in engine.optimizer.state.values()]
    assert counts == [2] * len(counts), "of empty parts, too"
    train(engine, 2, SIZE)
    same(kept(engine), after)


def kept_after_loading(engine):
    engine._grad_norm = torch.zeros(())  # of no step yet
    found = kept(engine)
    del found["norm"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    PLACE, what, stage = Path(sys.argv[1]), {"save": save, "load": load}[sys.argv[2]], int(sys.argv[3])
    deepfast.init_distributed()
    checks = {name: lambda name=name: what(name, stage) for name in OPTIMIZERS}
    run_checks(checks, PLACE / f"{RANK}.json")
