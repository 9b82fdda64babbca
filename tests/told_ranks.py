"""Run by test_skips.py on two ranks: what an engine tells there, and who tells it. A check says what is wrong."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from torch import nn

import deepfast
from deepfast.errors import LossScaleError, UserError

RANK = int(os.environ.get("RANK", "0"))
CONFIG = {"train_batch_size": 4, "optimizer": {"params": {"lr": 0.01}}, "gradient_clipping": 1.0}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 1, "hysteresis": 1, "max_skips_at_minimum": 2}}


def engine(config, stage=0):
    """Each parameter has two blocks, and of two ranks each owns half of them: some belong to one rank alone."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 128, bias=False) if i % 2 == 0 else nn.Linear(128, 64, bias=False)
                          for i in range(4)))  # fmt: skip
    return deepfast.initialize(model=net, config={**CONFIG, **config, "zero_optimization": {"stage": stage}})[0]


def step(e, factor=1.0):
    e.backward(e(torch.ones(2, 64) * (RANK + 1)).float().mean() * factor)
    e.step()


@contextlib.contextmanager
def heard():
    """What this rank warns of, and what it prints."""
    lines, out = [], io.StringIO()
    handler, log = logging.Handler(), logging.getLogger("deepfast")
    handler.emit = lambda record: lines.append(record.getMessage()) if record.levelno > logging.INFO else None
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(out):
            yield lines, out
    finally:
        log.removeHandler(handler)


def spoiled(e) -> str:
    """The name of a parameter that the last rank alone steps, or the last there is; its gradient is NaN from now on."""
    own = [part.begin < part.end for part in e._parts()]
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    of_last = [last and not first for first, last in zip(of_all[0], of_all[-1], strict=True)]
    name = e._names()[of_last.index(True) if True in of_last else -1]
    dict(e.module.named_parameters())[name].register_hook(lambda grad: grad * float("nan"))
    return name


def check_skips_are_told_once_and_the_error_is_everywhere():
    for stage in (0, 1, 2):
        e = engine({**FP16, "name_nonfinite": True}, stage)
        name = spoiled(e)
        with heard() as (lines, _):
            step(e), step(e)
            with pytest.raises(LossScaleError) as caught:
                step(e)
        told = [f"step {1 + i}" + f" skipped: inf or NaN in the gradients, first in {name!r}; loss scale {scale}"
                for i, scale in enumerate(("2 -> 1", "1 -> 1", "1 -> 1"))]  # fmt: skip
        assert lines == ([] if RANK else told), (stage, lines)
        assert f"2 skips in a row at loss scale 1 (the minimum): inf or NaN in 1 of 4 gradients ({name!r})" in str(
            caught.value
        )
        assert caught.value.parameters == (name,)
        assert (e.global_steps, e.skipped_steps) == (3, 3)


def check_what_propagates_is_told_once():
    for stage in (0, 2):
        e = engine({"name_nonfinite": True}, stage)
        name = spoiled(e)
        with heard() as (lines, _):
            for _ in range(11):
                step(e)
        assert e.nonfinite_steps == 11
        assert [line[:7] for line in lines] == ([] if RANK else ["step 1:", "step 10"]), lines
        # From the second step on all weights are NaN, and so all gradients.
        assert RANK or f"first in {name!r}" in lines[0], lines


def check_rank_0_writes_and_prints():
    folder = Path(sys.argv[1])
    settings = {"steps_per_print": 2, "wall_clock_breakdown": True,
                "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"}}  # fmt: skip
    e = engine(settings)
    with heard() as (_, out):
        for _ in range(4):
            step(e)
            dist.barrier()
    e.monitor.write_events([("mine", RANK, 1)])
    e.monitor.close()
    dist.barrier()
    assert e.monitor.enabled
    assert e.get_wall_clock_timers().keys() == {"fwd", "bwd", "step"}
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ([] if RANK else ["step=2", "step=4"]), lines
    assert (folder / "csv" / "mine.csv").read_text() == "step,mine\n1,0\n"
    rows = (folder / "csv" / "Train_Samples_lr.csv").read_text().splitlines()
    assert rows == ["step,lr", *(f"{4 * n},0.01" for n in (1, 2, 3, 4))]


def check_what_rank_0_cannot_write_is_an_error_everywhere():
    if RANK == 0:
        sys.modules["wandb"] = None
    with pytest.raises(UserError, match="pip install wandb"):
        engine({"wandb": {"enabled": True}})


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    deepfast.init_distributed()
    run_checks(CHECKS, Path(sys.argv[1]) / f"{RANK}.json")
