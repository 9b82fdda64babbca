"""The CUDA kernels, compiled for the host with sanitizers, against the CPU kernels: equal to the last bit.

What cannot show here, races between thread blocks, the design rules out: blocks write disjoint elements, and what one
block reads of another (partial sums, and step counts that the last block moves on) lies on either side of a fence and
an atomic arrival (csrc/cuda/table.cuh, last_to_arrive).
"""

from __future__ import annotations

import shutil
import time

import on_host
import pytest
import torch
from cases import EVERY, OURS, TYPICAL, VARIANTS, give_gradients, kept, parameters
from conftest import ROOT, run
from torch import nn
from wholes import check_a_plan_of_shards

import deepfast
from deepfast import ops

# Scenario, and how many cases of it.
SCENARIOS = {
    "step": 700,  # every dtype, layout of streams, tail
    "one": 70,  # many thread blocks on one span
    "limit": 70,  # the table just fits a launch's parameters, or just does not
    "limit-groups": 70,
    "thousands": 14,
    "empty": 70,
    "rows": 32,  # of blocks' sums
    "fold": 80,
    "statistics": 500,
    "statistics-many": 20,
    "accumulate": 200,
    "accumulate-many": 20,
    "scaler": 300,
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_same_bits_as_on_a_cpu(harness, scenario, seed):
    done = run(harness, scenario, SCENARIOS[scenario] // 2, seed, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{SCENARIOS[scenario] // 2} cases")


@pytest.mark.parametrize("program", ["harness", "ranks"])
def test_a_device_that_fails_ends_the_program(request, program):
    scenario = ["step"] if program == "harness" else []
    done = run(request.getfixturevalue(program), *scenario, 10, 1, env={"CUDA_ON_HOST_LOST": "1"})
    assert "device" in done.stderr
    assert done.stdout == ""
    assert done.returncode == 3 or program != "harness"
    assert done.returncode != 0


def test_what_was_made_of_other_sources_is_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(on_host, "_run", lambda command: (made.append(command), command[-1].touch()))
    for changed, count in ((0.0, 1), (0.0, 1), (time.time() + 1, 2)):
        monkeypatch.setattr(on_host, "_last_change", lambda changed=changed: changed)
        on_host._made(tmp_path / "program", {}, ["link"])
        assert len(made) == count


def test_unknown_scenarios_are_refused(harness):
    assert run(harness, "steps", 10, 1).returncode == 2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_collectives_of_ranks_in_one_launch(ranks, seed):
    """One to four ranks, each a thread: the bits of csrc/math/collective.h, and the CPU's statistics."""
    done = run(ranks, 300, seed, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("300 cases")


BESIDE = "AddressSanitizer: heap-buffer-overflow"
# Where the fault is, what it is, the source and the scenario that show it, and what is said.
PLANTED = {
    "a pack too many": (
        "cuda/pack.cuh", "head + (end - head) / kSize * kSize", "head + (end - head + kSize - 1) / kSize * kSize",
        "cuda/step.cu", "step", BESIDE,
    ),
    "a barrier missing": (
        "cuda/step.cuh", "    __syncthreads();\n    const Rule rule = shared;", "    const Rule rule = shared;",
        "cuda/step.cu", "step", "",
    ),
    "a barrier missing between warps": (
        "cuda/int8.cuh", "if (packed < n) __syncthreads();  // one by one", "// one by one", "cuda/step.cu", "step", "",
    ),
    "partial sums": (
        "cuda/statistics.cu", "partial[block] =", "partial[block + 1] =", None, "statistics", "another sum of squares",
    ),
    "a byte beside": (
        "cuda/scaler.cu", "bool overflow = false;", "bool overflow = reinterpret_cast<const char*>(state + 1)[0] == 7;",
        None, "scaler", BESIDE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(harness, tmp_path, fault):
    """Accesses beside buffers, and a missing barrier: the harness that finds none must be one that would."""
    file, right, wrong, source, scenario, says = PLANTED[fault]
    clone = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", clone)
    text = (clone / file).read_text()
    assert right in text
    (clone / file).write_text(text.replace(right, wrong))
    planted = on_host.variant(harness, clone / (source or file), tmp_path)
    done = run(planted, scenario, 50, 1, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode not in (0, 2)
    assert says in done.stderr


@pytest.mark.parametrize("program", on_host.PROGRAMS)
def test_the_programs_compile_for_a_gpu(tmp_path, program):
    """With CUDA's own headers, and it all links; where there is no GPU they say so."""
    made = on_host.gpu_program(tmp_path, program, ["compute_90"])
    done = run(made, *(["step"] if program == "harness" else []), 1, 1, env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert done.returncode == 3 or program != "harness"
    assert done.returncode != 0
    assert done.stdout == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "variant"), EVERY)
@pytest.mark.parametrize("backend", ["cuda"])
def test_whole_steps_give_the_same_bits(name, variant, dtype, backend):
    """Norm, clipping, update, rounding and reset through the optimizers, on both backends."""
    compare_steps(name, dtype, backend, **VARIANTS[name][variant])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "forms", [{"master": "fp32"}, {"master": "none", "state_dtype": "param"}, {"state_dtype": "bf16"}]
)
@pytest.mark.parametrize("backend", ["cuda"])
def test_so_do_steps_of_whatever_is_kept_in_another_form(name, dtype, forms, backend):
    compare_steps(name, dtype, backend, **forms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("backend", ["cuda"])
def test_so_do_steps_with_moments_in_8_bits(name, dtype, backend):
    form = {"exp_avg": "int8"} if "amsgrad" in TYPICAL[name] else "int8"
    compare_steps(name, dtype, backend, state_dtype=form, **TYPICAL[name])


def compare_steps(name, dtype, backend, **options):
    results = []
    for chosen in (backend, "cpu"):
        params = parameters(dtype)
        optimizer = OURS[name](params, backend=chosen, max_grad_norm=1.0, reset_grad=True, **options)
        for step in range(3):
            give_gradients(params, seed=step, scale=10.0 ** (step - 1))
            optimizer.step()
        tensors = [t for p in params for t in (p, p.grad, kept(optimizer, p), *optimizer.state[p].values())]
        results.append([*tensors, optimizer.grad_norm])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cuda"])
def test_a_full_half_precision_step_is_two_launches(cuda_on_host, backend):
    params = parameters(torch.float16)
    optimizer = deepfast.AdamW(params, max_grad_norm=1.0, reset_grad=True, backend=backend)
    scaler = deepfast.LossScaler(init_scale=128.0)
    scaler.scale(torch.ones(()))
    for step in range(3):
        give_gradients(params, seed=step)
        before = cuda_on_host.launches()
        scaler.step(optimizer)
        assert cuda_on_host.launches() - before == 2 + (step == 0)  # a new plan looks at the masters once
        scaler.update()


@pytest.mark.parametrize("backend", ["cuda"])
def test_thousands_of_parameters_are_one_launch_once_they_are_known(cuda_on_host, backend):
    params = [nn.Parameter(torch.full((3,), float(i))) for i in range(1000)]
    optimizer = deepfast.SGD(params, lr=1.0, backend=backend)
    for p in params:
        p.grad = torch.ones(3)
    launches = []
    for step in range(4):
        if step == 3:
            params[500].grad = torch.full((3,), 2.0)
        before = cuda_on_host.launches()
        optimizer.step()
        launches.append(cuda_on_host.launches() - before)
    pieces = launches[0] - 1
    assert pieces > 1
    assert launches == [1 + pieces, 1, 1, 2], "what is sent again is only what has changed"
    assert all((p == i - (4 if i != 500 else 5)).all() for i, p in enumerate(params))


@pytest.mark.parametrize("count", [3, 1000])
def test_what_goes_into_a_graph_takes_no_memory_from_outside(cuda_on_host, count):
    """A graph runs again when the plan's own memory may be gone or hold another table."""
    made = [nn.Parameter(torch.ones(5)) for _ in range(count)]
    for p in made:
        p.grad = torch.ones(5)
    plan = cuda_on_host.Plan("sgd", made, [torch.empty(0)] * count, [], [], torch.zeros(count, dtype=torch.int32))
    hyper = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    record = torch.tensor([1.0, 0.0, 0.0])

    def step() -> int:
        before = cuda_on_host.launches()
        plan.gather([], False)
        plan.step(hyper, [], record, None)
        return cuda_on_host.launches() - before

    first = step()
    assert step() == 1
    cuda_on_host.capture(True)
    try:
        assert step() == first, "the whole table is part of the graph"
    finally:
        cuda_on_host.capture(False)
    assert step() == 1
    assert all((p == -1.0).all() for p in made)


def test_plans_of_shards(cuda_on_host):
    check_a_plan_of_shards(cuda_on_host.Plan)


def test_learning_rates_are_read_when_the_kernel_runs(cuda_on_host):
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    plan = cuda_on_host.Plan("sgd", [p], [torch.empty(0)], [], [], torch.zeros(1, dtype=torch.int32))
    hyper = torch.tensor([[1.0, 99.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for lr in (torch.tensor(0.25), torch.tensor([0.5], dtype=torch.float64)):
        plan.gather([], False)
        plan.step(hyper, [lr], torch.tensor([1.0, 0.0, 0.0]), None)
    assert (p == 0.25).all()
    plan.gather([], False)
    with pytest.raises(RuntimeError, match="one float32 or float64 value"):
        plan.step(hyper, [torch.tensor(1)], torch.tensor([1.0, 0.0, 0.0]), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["sgd", "lion", "adagrad"])
def test_chance_is_the_same_and_moves_on(cuda_on_host, rule, dtype):
    """Weights without a master, of which some are parts of larger ones; one step of the three is skipped."""
    moments, hyper = {
        "sgd": (0, [0.1, 0, 0, 0, 0]),
        "lion": (1, [0.1, 0.9, 0.99, 0]),
        "adagrad": (1, [0.1, 0, 0, 1e-8]),
    }[rule]
    results = []
    for backend in (cuda_on_host, ops.native):
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=g).to(dtype)) for n in (5, 4099, 4099)]
        steps = [torch.full((), 3.0) for _ in params]
        kept = [torch.zeros(p.shape, dtype=dtype) for _ in range(moments) for p in params]
        plan = backend.Plan(
            rule, params, [torch.empty(0)] * 3, kept, steps, torch.zeros(len(params), dtype=torch.int32)
        )
        plan.by_chance([7, 8, 8], [0, 0, 4099], True)
        for skipped in (0.0, 2.0, 0.0):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            plan.gather([], 0)
            plan.step(torch.tensor([[1.0, *hyper]], dtype=torch.float64), [], torch.tensor([1.0, skipped, 0.0]), None)
        assert all(step == 5.0 for step in steps)
        results.append([*params, *kept])
    assert all(map(torch.equal, *results))


def test_codes_that_no_word_could_be_read_of_are_refused(cuda_on_host):
    p = nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    steps, groups = [torch.zeros(())], torch.zeros(1, dtype=torch.int32)
    for backend in (cuda_on_host, ops.native):
        for begin, allowed in ((4, True), (2, False)):
            codes = torch.zeros(72, dtype=torch.uint8)[begin : begin + 66]
            plan = backend.Plan("adagrad", [p], [torch.empty(0)], [codes], steps, groups)
            plan.by_chance([7], [0], False)
            if allowed:
                assert plan.gather([], 0) == 1
                continue
            with pytest.raises(RuntimeError, match="a boundary of 4 bytes"):
                plan.gather([], 0)


def test_the_operators_give_the_same_bits(cuda_on_host):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=g).to(dtype) for n in (0, 5, 4097) for dtype in ops.KERNEL_DTYPES]
    assert torch.equal(cuda_on_host.statistics(grads), ops.native.statistics(grads))
    sums = [torch.randn(g.shape) for g in grads]
    twins = [t.clone() for t in sums]
    for backend, target in ((cuda_on_host, sums), (ops.native, twins)):
        backend.accumulate_(target, grads, 0.3, False)
    assert all(map(torch.equal, sums, twins))
    for overflow in (0.0, 2.0):
        states = [torch.tensor([8.0, 1.0, 1.0, 0.0]) for _ in range(2)]
        for backend, state in zip((cuda_on_host, ops.native), states, strict=True):
            found = [torch.zeros(()), torch.tensor(overflow)]
            backend.scaler_update_(state, found, 2.0, 0.5, 2, 1, False, True, 1.0, 64.0)
        assert torch.equal(*states)
    records = [torch.zeros(3) for _ in range(2)]
    known = ops.native.statistics(grads)
    for backend, record in zip((cuda_on_host, ops.native), records, strict=True):
        backend.decide_(record, known, torch.tensor(8.0), torch.tensor(0.0), 0.5, True)
    assert torch.equal(*records)


def test_capturing_needs_what_a_replay_can_change(monkeypatch):
    from deepfast import graphs

    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
    fresh = deepfast.AdamW([p], lr=torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="step once before the capture"):
        fresh.step()
    sgd = deepfast.SGD([p], lr=0.5)
    with pytest.raises(RuntimeError, match=r"lr=torch.tensor\(0.5, device='cuda'\)"):
        sgd.step()
    assert (p == 1).all()
