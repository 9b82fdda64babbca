"""Run by test_zero.py on two ranks: one is killed while it trains in shards, and the other learns who is missing."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from checks import run_checks
from zero_ranks import DTYPES, RANK, SIZE, run, train

from deepfast.comm import PeerTimeout

MOMENTS = ("backward", "before the step", "in the step")


def killed(moment):
    engine = run(DTYPES["fp16"], 2, 2, steps=1)
    if RANK == 1:

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "backward":
            engine.module.wide.weight.register_hook(die)
        elif moment == "before the step":
            engine._gradients.reduction.shards.check = die
        else:
            engine._gradients.reduction.shards.spread = die
        train(engine, 1, SIZE)
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        train(engine, 1, SIZE)
    assert caught.value.ranks == (1,)
    assert time.monotonic() - start < 60  # of the timeout's 600: at once
    with pytest.raises(RuntimeError, match="broken"):
        train(engine, 2, SIZE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    moment = MOMENTS[int(sys.argv[2])]
    if "hosts" in sys.argv:
        os.environ["DEEPFAST_HOST_ID"] = f"host {RANK}"
    Path(sys.argv[1], f"{RANK}.json").write_text("{}" if RANK else "")  # of the one that will be killed
    run_checks({moment: lambda: killed(moment)}, Path(sys.argv[1], f"{RANK}.json"))
