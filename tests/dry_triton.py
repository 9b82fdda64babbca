"""Run by test_triton_dry.py: all that the Triton backend launches, on triton_dry/play.py. A check says what is wrong.

python dry_triton.py OUT FOLDER
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from cases import EVERY, NAMES, OURS, TYPICAL, VARIANTS, give_gradients, parameters
from checks import run_checks
from torch import nn
from triton_dry.play import Played, play

import deepfast
from deepfast import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Beside 16-byte boundaries and on them, whole blocks and parts of one, one element and none; all in one launch.
SHAPES = [(64, 33), (5,), (), (0, 3), (3000, 7), (1, 4097), (1 << 14,)]
# What a warm step with clipping launches, however many tensors it has: they are all of one kind.
WARM = {"squares_kernel": 1, "fold_kernel": 1, "prepare_kernel": 1, "step_kernel": 1}
WARM_LAMB = {**WARM, "prepare_kernel": 2, "norms_kernel": 1, "fold_norms_kernel": 1}
OPTIONS = {"backend": "triton", "max_grad_norm": 1.0, "reset_grad": True}

played: Played


def stepped(name: str, dtype: torch.dtype, shapes: list, steps: int = 3, **options) -> Counter[str]:
    """Steps an optimizer; what the last step has launched."""
    params = parameters(dtype, shapes)
    optimizer = OURS[name](params, **OPTIONS, **options)
    launched = Counter()
    for step in range(steps):
        give_gradients(params, seed=step)
        before = played.launches()
        optimizer.step()
        launched = played.launches() - before
    return launched


def needs_norms(name: str) -> bool:
    optimizer = OURS[name]([nn.Parameter(torch.zeros(1))])
    return reference.RULES[optimizer._rule(optimizer.param_groups[0])].adapt is not None


def optimizer_check(name: str, dtype: torch.dtype) -> None:
    first = stepped(name, dtype, SHAPES, **TYPICAL[name])
    assert first == (WARM_LAMB if needs_norms(name) else WARM), first
    known = played.variants.copy()
    assert stepped(name, dtype, SHAPES * 9, **TYPICAL[name]) == first, "more tensors, more launches"
    assert stepped(name, dtype, [(1,)], **TYPICAL[name]) == first
    assert stepped(name, dtype, [(16,)] * 16, **TYPICAL[name]) == first
    again = played.variants - known
    assert not again, f"compiled again: {again}"


def check_every_variant():
    for (name, variant), dtype in itertools.product(EVERY, DTYPES):
        launched = stepped(name, dtype, SHAPES[:3], steps=2, **VARIANTS[name][variant])
        assert launched == (WARM_LAMB if needs_norms(name) else WARM), (name, variant, dtype, launched)


def check_storage_forms():
    """One launch whatever the form, and the second optimizer finds all compiled."""
    chance = {"master": "none", "rounding": "stochastic"}
    forms = ({"master": "fp32"}, {"state_dtype": "param"}, {"master": "none", "state_dtype": "bf16"}, chance,
             {"state_dtype": "int8"}, {**chance, "state_dtype": "int8"})  # fmt: skip
    for name, dtype, form in itertools.product(("Adam", "LAMB", "SGD"), DTYPES[1:], forms):
        launched = stepped(name, dtype, SHAPES[:3], steps=2, **form)
        assert launched == (WARM_LAMB if needs_norms(name) else WARM), (name, dtype, form, launched)
        known = played.variants.copy()
        if "rounding" in form:
            form = {**form, "seed": 12345}
        assert stepped(name, dtype, [(1,)], steps=2, **form) == launched
        assert not played.variants - known, f"compiled again: {played.variants - known}"


def check_tensors_beside_a_boundary():
    """They are another kind than those on one, so there is another launch."""
    for dtype in DTYPES:
        params = [nn.Parameter(torch.ones(5001, dtype=dtype)[offset:]) for offset in (0, 1, 0, 1)]
        optimizer = deepfast.AdamW(params, **OPTIONS)
        for step in range(2):
            give_gradients(params, seed=step)
            before = played.launches()
            optimizer.step()
            launched = played.launches() - before
        assert launched == {**WARM, "squares_kernel": 2, "step_kernel": 2}, launched
        sums = [torch.zeros(5001)[offset:] for offset in (0, 1)]
        grads = [torch.ones(5001, dtype=dtype)[offset:] for offset in (0, 1)]
        before = played.launches()
        ops.triton().accumulate_(sums, grads, 0.5, False)
        assert played.launches() - before == {"accumulate_kernel": 2}


def check_a_kernel_that_does_not_compile():
    """It must be an error, or all of this says nothing."""
    import triton
    import triton.language as tl
    from triton.compiler.errors import CompilationError

    @triton.jit
    def wrong_kernel(at):
        tl.store(at, tl.no_such_function(1.0))

    before = played.launches()
    try:
        wrong_kernel[(1,)](torch.zeros(1))
    except CompilationError:
        assert played.launches() == before
        return
    raise AssertionError("it was launched")


def check_scaler():
    params = parameters(torch.float16, SHAPES)
    optimizer = deepfast.AdamW(params, **OPTIONS)
    scaler = deepfast.LossScaler("cpu", init_scale=128.0)
    scaler.scale(torch.ones(()))
    launched = []
    for step in range(3):
        give_gradients(params, seed=step)
        before = played.launches()
        scaler.step(optimizer)
        launched.append(played.launches() - before)
        before = played.launches()
        scaler.update()
        assert played.launches() - before == {"scaler_kernel": 1}
    assert launched[-1] == WARM, launched
    state, found = torch.zeros(4), torch.zeros(())
    for options in ((2000, 1, False, True), (2, 2, True, True), (2, 1, False, False)):
        known: Counter[str] = Counter()
        for count in (1, 2, 9, 16):
            before = played.launches()
            ops.triton().scaler_update_(state, [found] * count, 2.0, 0.5, *options, 1.0, 2.0**24)
            assert played.launches() - before == {"scaler_kernel": 1}
            assert known in ({}, played.variants), "compiled again for another number of flags"
            known = played.variants.copy()


def check_statistics_and_decisions():
    backend = ops.triton()
    for dtype, offset in itertools.product(DTYPES, (0, 1)):
        grads = [torch.zeros(5000, dtype=dtype)[offset:], torch.zeros(0, dtype=dtype), torch.zeros((), dtype=dtype)]
        before = played.launches()
        backend.statistics(grads)
        launched = played.launches() - before
        assert launched == {"squares_kernel": 1 + offset, "fold_kernel": 1}, launched
    backend.statistics([torch.zeros(0)])
    record, one, sums = torch.zeros(3), torch.ones(()), torch.zeros(2, dtype=torch.float64)
    for statistics, scale, found in itertools.product((None, sums), (None, one), (None, one)):
        before = played.launches()
        backend.decide_(record, statistics, scale, found, 0.0, False)
        if statistics is not None:
            backend.decide_(record, statistics, scale, found, 1.0, True)
        assert (played.launches() - before)["decide_kernel"] == (1 if statistics is None else 2)


def check_accumulation():
    for dtype, count in itertools.product(DTYPES, (1, 7)):
        sums = [torch.zeros(n) for n in (1, 0, 7, 1023, 1025)] * count
        for overwrite in (True, False):
            before = played.launches()
            ops.triton().accumulate_(sums, [torch.ones(s.numel(), dtype=dtype) for s in sums], 0.5, overwrite)
            assert played.launches() - before == {"accumulate_kernel": 1}


def check_what_a_graph_takes():
    """Where a graph is captured, tables go as kernels' parameters; the same kernel for whatever they hold."""
    from deepfast import graphs
    from deepfast.kernels import table

    written = table._written
    real, captured = graphs.capturing, []

    def filled(values, device):  # as the kernels would: what comes next counts on it
        captured.append(len(values))
        return written(values, device).copy_(torch.tensor(values))

    known: Counter[str] = Counter()
    for count in (7, 600):
        params = [nn.Parameter(torch.ones(37).half()) for _ in range(count)]
        optimizer = deepfast.AdamW(params, lr=torch.tensor(0.1), **OPTIONS)
        give_gradients(params)
        optimizer.step()
        graphs.capturing = lambda device: True
        table._written = filled
        try:
            before = played.launches()
            optimizer.step()
            launched = played.launches() - before
        finally:
            table._written, graphs.capturing = written, real
        assert captured, "nothing was taken into the graph"
        assert launched == {**WARM, "_write": launched["_write"]}, launched
        assert launched["_write"] >= max(1, count * 8 // 256)
        assert known in ({}, played.variants), f"compiled again: {played.variants - known}"
        known = played.variants.copy()


def collective(kind: str, source, output, statistics=None, found_inf=None, *, factor=0.5, one_shot=False) -> None:
    """Rank 0 of two."""
    from deepfast.kernels import collectives

    memory = torch.zeros(2, collectives.peer_layout()[1], dtype=torch.uint8)
    data = [] if one_shot else [source.data_ptr()] * 2
    status = torch.zeros(64, dtype=torch.int32)
    before = played.launches()
    collectives.collective_(kind, source, output, [m.data_ptr() for m in memory], data, -1 if one_shot else 4096, 0,
                            factor, statistics, found_inf, status)  # fmt: skip
    assert played.launches() - before == {"collective_kernel": 1}


def check_collectives():
    """Each kind, each type: not each with each, they take a second to compile."""
    measured = torch.zeros(2, dtype=torch.float64), torch.zeros(1)
    for dtype in (torch.float32, torch.bfloat16):
        known: Counter[str] = Counter()
        for numel in (70_000, 70_008, 300_000):  # in peer memory, all parts on boundaries
            t, parts = torch.zeros(numel, dtype=dtype), torch.zeros(2, numel, dtype=dtype)
            collective("all_reduce", t, t, *measured)
            collective("reduce_scatter", parts, t, *measured)
            collective("all_gather", t, parts, factor=1.0)
            assert known in ({}, played.variants), "compiled again for another size"
            known = played.variants.copy()
    for dtype in (*DTYPES, torch.float64, torch.int32, torch.int64):
        for numel in (16, 1000, 4097):
            t = torch.zeros(numel, dtype=dtype)
            collective("all_reduce", t, t, *(measured if dtype in DTYPES else ()), one_shot=True)
    wide, narrow = torch.zeros(9001), torch.zeros(2, 9001, dtype=torch.bfloat16)  # the second part beside a boundary
    collective("reduce_scatter", narrow, wide, *measured)
    collective("all_gather", wide, narrow, factor=1.0)
    collective("all_reduce", wide, wide, measured[0])


CHECKS = {
    **{
        f"{name}, {str(dtype).removeprefix('torch.')}": lambda name=name, dtype=dtype: optimizer_check(name, dtype)
        for name, dtype in itertools.product(NAMES, DTYPES)
    },
    **{name.removeprefix("check_").replace("_", " "): check for name, check in list(globals().items())
       if name.startswith("check_")},
}  # fmt: skip

if __name__ == "__main__":
    os.environ["DEEPFAST_BACKEND"] = "triton"  # for what is not told which: the scaler's update
    played = play(Path(sys.argv[2]))
    run_checks(CHECKS, Path(sys.argv[1]))
    print("variants", dict(played.variants), "launches", dict(played.launches()), file=sys.stderr)
