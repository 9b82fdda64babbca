"""Run by test_gpu_engine.py on two ranks that share a GPU: a sharded engine over its kernels and its memory.

    python tests/gpu_engine_ranks.py PLACE BACKEND             each maps the other's memory
    python tests/gpu_engine_ranks.py PLACE BACKEND LIBRARY     the same, played on the host

What one process makes of all the micro-batches is computed on the CPU first; gradients are exact (zero_ranks.Exact), so
it is the same to the last bit. But for LAMB's norms: those are added up by parts here, so ratios may be rounded
differently, and weights after them.
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import zero_edges
from checks import run_checks
from played import Played, play
from torch import nn
from zero_ranks import (
    ALONE,
    CASES,
    DTYPES,
    SIZE,
    STEPS,
    Exact,
    before_there_are_ranks,
    in_memory,
    kept,
    overflows,
    run,
    same,
    same_everywhere,
    train,
)

from deepfast import ops, reference
from deepfast.comm import across
from deepfast.comm.gpus import OnPeers
from deepfast.engine import reduction
from deepfast.engine.scattered import ScatteredSums
from deepfast.engine.sums import GradientSums

PATIENCE = datetime.timedelta(seconds=30)
CASES.update(
    {
        "LAMB fp32": ({"gradient_clipping": 0.5}, 2, {"optimizer": "LAMB"}),
        "LAMB fp16": (DTYPES["fp16"], 2, {"optimizer": "LAMB", "spoil": overflows}),
        "SGD fp32": ({"gradient_clipping": 0.5}, 2, {"optimizer": "SGD"}),
        "SGD fp16": (DTYPES["fp16"], 1, {"optimizer": "SGD", "spoil": overflows}),
    }
)
# Where kernels are compiled when they are first launched, and where they are played.
FEW = ("fp32 one", "bf16 several", "overflow", "no master", "LAMB bf16", "SGD fp32")
EXACT_EDGES = ("weights_written_from_outside", "plain_torch_steps_parts")
EDGES = ("no_sync_and_weights", "a_parameter_that_has_become_another",
         "what_backward_still_needs_is_not_overwritten")  # fmt: skip
STAGE = 0  # of the engine that is being made, where a GPU is played


def cases(few):
    return {n: (c, k, {**o, "net": Exact}) for n, (c, k, o) in CASES.items() if not few or n in FEW}


def made(config, stage, accumulation, **options):
    """An engine before its first step, in peer memory. (What is gone gives its place on the GPU free before.)"""
    global STAGE  # noqa: PLW0603
    if torch.cuda.is_initialized():  # a check that has failed may have left kernels behind that still use it
        torch.cuda.synchronize()
    gc.collect()
    STAGE = stage
    return run(config, stage, accumulation, steps=0, **options)


def lies_in_peer_memory(engine, stage):
    """Nothing has fallen back to torch.distributed, and nothing has moved away from the GPU."""
    assert type(engine._gradients.sums) is (ScatteredSums if stage else GradientSums)
    assert type(engine._gradients.sums.comm._on(engine.device)) is OnPeers
    assert {p.device for p in engine.module.parameters()} == {engine.device}


def check_stages(name):
    config, accumulation, options = CHOSEN[name]
    spoil = options.get("spoil")
    for stage in (0, 1, 2):
        engine = made(config, stage, accumulation, **{k: v for k, v in options.items() if k != "spoil"})
        lies_in_peer_memory(engine, stage)
        for step in range(STEPS):
            train(engine, step, SIZE, spoil)
            same_everywhere(torch.cat([in_memory(p) for p in engine.module.parameters()]))
        found, alone = kept(engine), ALONE[name]
        for value in found.values():
            same_everywhere(value)
        assert engine.skipped_steps == (spoil is not None)
        if stage:
            assert all(launch.sends for launch in engine.optimizer._launches)
        if stage == 0 or options.get("optimizer") != "LAMB":
            same(found, alone)
            continue
        assert found.keys() == alone.keys()
        for key, value in found.items():
            tolerance = {"rtol": 1e-5, "atol": 1e-7} if value.dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-5}
            tolerance = {"rtol": 2e-3, "atol": 1e-5} if value.dtype == torch.float16 else tolerance
            torch.testing.assert_close(value, alone[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


def check_checkpoint():
    """Written by both ranks while they train on; what comes of it is left for one process to compare."""
    config, optimizers = {**DTYPES["fp16"], "gradient_clipping": 0.5}, ("AdamW", "SGD")
    for name in optimizers:
        engine = made(config, 2, 1, optimizer=name, net=Exact)
        for step in (0, 1):
            train(engine, step, SIZE)
        engine.save_checkpoint(PLACE / name, "two", {"so": "far"}, wait=False)
        train(engine, 2, SIZE)
        after = kept(engine)
        engine.wait_for_checkpoint()
        if dist.get_rank() == 0:
            torch.save(after, PLACE / f"{name}.pt")
        again = made(config, 1, 1, optimizer=name, net=Exact)
        assert again.load_checkpoint(PLACE / name)[1] == {"so": "far"}
        train(again, 2, SIZE)
        same(kept(again), after)


def of_edges(name, net):
    """One of zero_edges.py's checks, of engines whose gradients are exact, or not."""
    zero_edges.run = functools.partial(edge_run, **({"net": Exact} if net is Exact else {}))
    zero_edges.CHECKS[name]()


def edge_run(config, stage, accumulation, *, steps=STEPS, **options):
    engine = made(config, stage, accumulation, **options)
    for step in range(steps):
        train(engine, step, SIZE)
    return engine


def checks(backend, few):
    found = {f"stages: {name}": functools.partial(check_stages, name) for name in cases(few)}
    found["checkpoint"] = check_checkpoint
    if backend == "cuda":
        found |= {f"edges: {name}": functools.partial(of_edges, name, Exact) for name in EXACT_EDGES}
        found |= {f"edges: {name}": functools.partial(of_edges, name, nn.Module) for name in EDGES}
    return found


def play_a_gpu(library):
    """CPU tensors are a GPU's: the engine chooses for them as it would there."""
    play("cuda", library)
    across.multiprocessors = lambda device: 132
    _, backend = across._kernels(torch.device("cpu"))
    ops.select = lambda name, *_: reference if name == "reference" else backend
    reduction.OwnedSums = lambda params, comm, sharded: (
        ScatteredSums(params, comm, STAGE) if sharded else GradientSums(params, comm)
    )


if __name__ == "__main__":
    place, backend, *library = sys.argv[1:]
    few = bool(library) or backend == "triton"
    PLACE, CHOSEN = Path(place), cases(few)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # both on the first GPU
    before_there_are_ranks(CHOSEN)
    dist.init_process_group("gloo", timeout=PATIENCE)
    if library:
        play_a_gpu(*library)
    else:
        os.environ["DEEPFAST_BACKEND"] = backend
        torch.cuda.set_device(0)
        play("gpu", backend)
    reduction.communicator = functools.partial(Played, timeout=PATIENCE)
    run_checks(checks(backend, few), PLACE / f"{dist.get_rank()}.json", dist.barrier)
    dist.destroy_process_group()
