"""Run by test_zero.py on two ranks: a sharded engine over GPUs' collectives and kernels, played on the host.

What CPU tensors are here, peer memory is there: gradients are scattered by the GPUs' kernels, and the step writes the
weights of all ranks.
"""

from __future__ import annotations

import datetime
import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from played import Played, exact_fma, play
from zero_ranks import ALONE, CASES, RANK, before_there_are_ranks, kept, run, same_everywhere

from deepfast import ops
from deepfast.comm import across
from deepfast.engine import reduction
from deepfast.engine.scattered import ScatteredSums

# Both ranks' gradients of one micro-batch each: a + b is b + a. Clipping is by a norm that is added up by parts.
NAMES = [name for name, (config, accumulation, _) in CASES.items() if accumulation == 1 and "clip" not in str(config)]
CASES["LAMB"] = {}, 1, {"optimizer": "LAMB"}


def check(name, exact):
    config, _, options = CASES[name]
    for stage in (1, 2):
        engine = run(config, stage, 1, **options)
        assert type(engine._gradients.sums) is ScatteredSums
        assert all(launch.sends for launch in engine.optimizer._launches)
        found = kept(engine)
        for key, value in found.items():
            same_everywhere(value)
            tolerance = {"rtol": 0, "atol": 0} if exact and key != "norm" else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(value, ALONE[name][key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


if __name__ == "__main__":
    place, kernels, *library = sys.argv[1:]
    torch.set_num_threads(1)
    before_there_are_ranks({name: CASES[name] for name in (*NAMES, "LAMB")})
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS))
    play(kernels, *library)
    across.multiprocessors = lambda device: 132 * 100
    _, backend = across._kernels(torch.device("cpu"))
    ops.select = lambda *_: backend
    reduction.communicator = Played
    reduction.OwnedSums = lambda params, comm, sharded: ScatteredSums(params, comm, 2)
    exact = kernels == "cuda" or exact_fma()
    checks = {name: functools.partial(check, name, exact and name != "LAMB") for name in (*NAMES, "LAMB")}
    run_checks(checks, Path(place, f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
