"""Triton's kernels in its interpreter, against the CPU kernels: equal to the last bit.

    TRITON_INTERPRET=1 pytest -m triton tests/test_triton.py

in a process of its own, for the variable makes all of Triton run in the interpreter. An older Triton's interpreter has
no true fma; there results are compared to rounding.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import EVERY, HYPER, NAMES, OURS, TYPICAL, VARIANTS, give_gradients, kept, parameters
from checks import failures, heard_of_ranks
from comm_ranks import wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from played import exact_fma
from test_kernels import step_arguments, wrong
from torch import Tensor, nn
from wholes import check_a_plan_of_shards

import deepfast
from deepfast import kernels, ops, reference

pytestmark = pytest.mark.triton
SHAPES = [(16, 17), (5,), (), (0, 3), (1, 1030), (33, 7)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def exact() -> bool:
    return exact_fma()


def assert_same(a: Tensor, b: Tensor, exact: bool) -> None:
    a, b = a.detach(), b.detach()
    if exact:
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0)
        assert torch.equal(a, b)
        assert torch.equal(a.signbit(), b.signbit())
    elif not a.is_floating_point():
        pass  # what a parameter lacks says nothing without it
    else:
        torch.testing.assert_close(a, b, rtol=2e-2 if a.element_size() == 2 else 1e-5, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="module", autouse=True)
def backend():
    assert os.environ.get("TRITON_INTERPRET") == "1"
    assert kernels.available() is None
    return ops.triton()


def test_plans_of_shards(backend):
    check_a_plan_of_shards(backend.Plan)


def test_it_is_chosen_by_name():
    cpu = torch.device("cpu")
    assert ops.select("triton", cpu, torch.float32) is ops.triton()
    assert ops.select("triton", cpu, torch.float64) is reference
    assert ops.select("auto", cpu, torch.float32) is ops.native


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_whole_steps_give_the_same_bits(name, variant, dtype, exact):
    """Norm, clipping, update, rounding and reset through the optimizers."""
    results = []
    for chosen in ("triton", "cpu"):
        params = parameters(dtype, SHAPES)
        optimizer = OURS[name](params, backend=chosen, max_grad_norm=1.0, reset_grad=True, **VARIANTS[name][variant])
        for step in range(2):
            give_gradients(params, seed=step, scale=10.0 ** (step - 1))
            optimizer.step()
        tensors = [t for p in params for t in (p, p.grad, kept(optimizer, p), *optimizer.state[p].values())]
        results.append([*tensors, optimizer.grad_norm])
    for a, b in zip(*results, strict=True):
        assert_same(a, b, exact)


numbers = st.floats(-30, 12)  # decimal exponents
# elements, dtypes of parameter, gradient, master (of a 16-bit parameter) and moments, how far from an aligned address
spans = st.tuples(
    st.sampled_from([0, 1, 2, 63, 64, 1023, 1024, 1025, 2050]) | st.integers(0, 1500),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.float32, torch.int16]),
    st.sampled_from([[torch.float32] * 3]) | st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    st.sampled_from([0, 0, 0, 1, 4, 5]),
)
# seed of the first span and its place in a parameter
chances = st.tuples(st.integers(-(2**63), 2**63 - 5), st.integers(0, 1000) | st.integers(0, 2**40))


@given(
    rule=st.sampled_from(list(reference.RULES)),
    spans=st.lists(spans, min_size=1, max_size=4),
    sizes=st.tuples(numbers, numbers),
    poison=st.sampled_from([None, None, torch.inf, torch.nan]),
    record=st.tuples(st.floats(0.0, 2.0, width=32), st.sampled_from([0.0, 0.0, 0.0, 2.0])),
    sign=st.sampled_from([1.0, -1.0]),
    steps=st.sampled_from([0.0, 0.0, 1.0, 12345.0, 2.0**24]),
    lr=st.sampled_from([None, torch.float32, torch.float64]),
    reset=st.booleans(),
    chance=st.none() | chances,
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=120)
def test_steps_over_random_spans(
    exact, backend, rule, spans, sizes, poison, record, sign, steps, lr, reset, chance, seed
):
    what = reference.RULES[rule]
    hyper = torch.tensor([[sign, *HYPER[rule]], [-sign, *HYPER[rule]]], dtype=torch.float64)
    hyper[1, 1] = 0.025
    lrs = [] if lr is None else [None, torch.tensor(0.0625, dtype=lr)]
    decided = torch.tensor([*record, 0.0])
    results = []
    for plan_of in (backend.Plan, ops.native.Plan):
        g = torch.Generator().manual_seed(seed)

        def values(n, dtype, offset, exponent, positive=False, g=g):
            x = torch.randn(n + offset, generator=g) * 10.0**exponent
            return (x.abs() if positive else x).to(dtype)[offset:]

        def beside(param, form, offset, exponent, g=g):
            lacks = torch.randint(-0x8000, 0x8000, (param.numel() + offset,), generator=g, dtype=torch.int16)[offset:]
            if form == torch.int16:
                return lacks
            master = values(param.numel(), form, offset, exponent)
            master[::2] = (param.float().view(torch.int32) + lacks // 9)[::2].view(form)  # most of these round to it
            return master

        params = [values(n, dtype, offset, sizes[0]) for n, dtype, _, _, _, offset in spans]
        grads = [values(n, dtype, offset, sizes[1]) for n, _, dtype, _, _, offset in spans]
        if poison is not None and grads[0].numel():
            grads[0][grads[0].numel() // 2] = poison
        masters = [
            beside(p, master, offset, sizes[0]) if master and dtype != torch.float32 else torch.empty(0)
            for p, (_, dtype, _, master, _, offset) in zip(params, spans, strict=True)
        ]
        moments = [
            values(n, forms[k], offset, sizes[1], positive=k > 0 or what.moments == 1)
            for k in range(what.moments)
            for n, _, _, _, forms, offset in spans
        ]
        counts = [torch.tensor(steps) for _ in spans] if what.counts_steps or chance else []
        groups = torch.arange(len(spans), dtype=torch.int32) % 2
        plan = plan_of(rule, params, masters, moments, counts, groups)
        if chance:
            plan.by_chance(
                [chance[0] + k for k in range(len(spans))], [chance[1] + 5 * k for k in range(len(spans))], True
            )
        assert plan.gather(grads, reset) == len(spans)
        norms = plan.norms(hyper, lrs, decided) if plan.needs_norms() else None
        plan.step(hyper, lrs, decided, norms)
        results.append([*params, *grads, *masters, *moments, *counts, *([] if norms is None else [norms])])
    if not exact and (poison is not None or max(sizes) > 4):
        return  # what overflows depends on the last bit
    for a, b in zip(*results, strict=True):
        assert_same(a, b, exact)


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 9000), st.sampled_from(DTYPES), st.floats(-30, 20), st.integers(0, 9),
                  st.sampled_from([None, None, None, torch.inf, torch.nan])),
        min_size=1, max_size=4),
    question=st.tuples(st.sampled_from([None, 8.0]), st.sampled_from([None, 0.0, 2.0]), st.sampled_from([0.0, 0.5]),
                       st.booleans()),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_statistics_and_what_follows(exact, backend, parts, question):
    grads = []
    for n, dtype, exponent, offset, poison in parts:
        x = torch.randn(n + offset, generator=torch.Generator().manual_seed(n)) * 10.0**exponent
        g = x.to(dtype)[offset:]
        if poison is not None and n:
            g[n // 2] = poison
        grads.append(g)
    mine, theirs = backend.statistics(grads), ops.native.statistics(grads)
    assert (mine[1] > 0) == (theirs[1] > 0)
    if exact:
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    else:
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=0, equal_nan=True)
    scale, found, max_norm, check = question
    tensors = [None if value is None else torch.tensor(value) for value in (scale, found)]
    records = torch.zeros(2, 3)
    for record, chosen in zip(records, (backend, ops.native), strict=True):
        chosen.decide_(record, theirs, *tensors, max_norm, check)
    assert torch.equal(records[0].nan_to_num(7.0), records[1].nan_to_num(7.0))


@given(
    state=st.tuples(st.integers(-3, 26), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)),
    found=st.lists(st.sampled_from([0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=4),
    options=st.tuples(st.integers(1, 5), st.integers(1, 3), st.booleans(), st.booleans()),
)
@settings(deadline=None, max_examples=60)
def test_the_scalers_transitions(backend, state, found, options):
    states = [torch.tensor([2.0 ** state[0], *map(float, state[1:])]) for _ in range(2)]
    for values, chosen in zip(states, (backend, ops.native), strict=True):
        chosen.scaler_update_(values, [torch.tensor(f) for f in found], 2.0, 0.5, *options, 1.0, 2.0**24)
    assert torch.equal(*states)


@pytest.mark.parametrize("overwrite", [True, False])
def test_accumulate(backend, overwrite, exact):
    grads = [torch.randn(n).to(dtype)[o:] for n in (0, 5, 2050) for dtype in DTYPES for o in (0, 1)]
    sums = [torch.randn(g.shape) for g in grads]
    twins = [t.clone() for t in sums]
    backend.accumulate_(sums, grads, 0.3, overwrite)
    ops.native.accumulate_(twins, grads, 0.3, overwrite)
    for a, b in zip(sums, twins, strict=True):
        assert_same(a, b, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_scaling_end_to_end(dtype, exact):
    made = []
    for chosen in ("triton", "cpu"):
        params = parameters(dtype, [(40,), (3, 5)])
        optimizer = deepfast.AdamW(params, max_grad_norm=0.5, reset_grad=True, backend=chosen)
        scaler = deepfast.LossScaler(init_scale=64.0, growth_interval=2)
        for step in range(4):
            give_gradients(params, seed=step)
            if step == 1:
                params[0].grad[3] = torch.inf
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        made.append((params, scaler))
    assert made[0][1].state_dict() == made[1][1].state_dict()
    assert made[0][1].skipped_steps == 1
    for a, b in zip(made[0][0], made[1][0], strict=True):
        assert_same(a, b, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", list(reference.RULES))
def test_nothing_is_written_beside(backend, rule, dtype):
    """What lies around every buffer is NaN and stays so."""
    what = reference.RULES[rule]
    for n in (1, 63, 1024, 1025):
        whole = []

        def inside(value, dtype=torch.float32, n=n, whole=whole):
            t = torch.full((n + 128,), torch.nan, dtype=dtype)
            whole.append(t)
            return t[64 : 64 + n].copy_(value)

        x = torch.linspace(-2, 2, n)
        master = inside(x) if dtype != torch.float32 else torch.empty(0)
        param, grad = inside(x, dtype), inside(x + 0.5, dtype)
        moments = [inside(torch.full_like(x, 0.25)) for _ in range(what.moments)]
        steps = [torch.zeros(())] if what.counts_steps else []
        hyper = torch.tensor([[1.0, *HYPER[rule]]], dtype=torch.float64)
        backend.step_(rule, [param], [grad], [master], moments, steps, hyper, torch.zeros(1, dtype=torch.int32),
                      torch.tensor([1.0, 0.0, 0.0]), True)  # fmt: skip
        for t in whole:
            assert t[:64].isnan().all()
            assert t[64 + n :].isnan().all()
            assert t[64 : 64 + n].isfinite().all()
        assert not grad.any()
        assert (param.float() != x).any() or n == 1


@pytest.mark.parametrize("name", NAMES)
def test_any_layout(name, exact):
    results = []
    for chosen in ("triton", "cpu"):
        p = nn.Parameter(torch.arange(24.0).reshape(4, 6).t())
        q = nn.Parameter(torch.arange(48.0).reshape(6, 8)[:, ::2])
        optimizer = OURS[name]([p, q], lr=0.1, reset_grad=True, backend=chosen, **TYPICAL[name])
        for _ in range(2):
            p.grad, q.grad = torch.sin(p.detach()).contiguous(), torch.cos(q.detach()).t().contiguous().t()
            optimizer.step()
        results.append([p, q, p.grad, q.grad])
    for a, b in zip(*results, strict=True):
        assert_same(a, b, exact)


def test_a_plan_notices_what_has_moved():
    """State replaced, a gradient elsewhere, a write from outside: each against a fresh start on the CPU."""
    pairs = []
    for chosen in ("triton", "cpu"):
        params = parameters(torch.bfloat16, [(40,), (7,)])
        optimizer = deepfast.AdamW(params, lr=0.1, backend=chosen)
        for step in range(4):
            give_gradients(params, seed=step)
            if step == 1:
                optimizer.state[params[0]]["exp_avg"] = torch.ones(40)
            if step == 2:
                with torch.no_grad():
                    params[1].fill_(3.0)
            if step == 3:
                optimizer.state[params[1]]["exp_avg_sq"].data = torch.full((7,), 0.5)
            optimizer.step()
        pairs.append(params)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (wrong(0, "adamx"), "no rule named 'adamx'"),
        (wrong(2, [torch.randn(4, 3)]), "3 tensors of gradients expected, got 1"),
        (wrong(2, [torch.randn(3, 4)] * 3), r"gradient has shape \[3, 4\], its parameter \[4, 3\]"),
        (wrong(2, [torch.zeros(4, 3, dtype=torch.int32)] * 3), "dtype Int"),
        (wrong(4, [torch.zeros(4, 3)] * 5), "6 tensors of moments expected, got 5"),
        (wrong(4, [torch.zeros(4, 3).short()] * 6), "moment has dtype Short"),
        (wrong(3, [torch.zeros(4, 3).half()] * 3), "master has dtype Half"),
        (wrong(3, [torch.zeros(4, 3).short()] * 3), "master has dtype Short"),  # beside a parameter in fp32
        (wrong(5, [torch.zeros(2)] * 3), "step count must be 1"),
        (wrong(6, torch.zeros(1, 6)), "float64 matrix"),
        (wrong(6, torch.zeros(1, 3, dtype=torch.float64)), "'adam' takes 8 hyperparameters, got 3"),
        (wrong(7, torch.ones(3, dtype=torch.int32)), "group 1 of 1"),
        (wrong(8, torch.zeros(2)), "record must be 3"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(backend, arguments, message):
    before = [p.clone() for p in arguments[1]]
    with pytest.raises(RuntimeError, match=message):
        backend.step_(*arguments)
    assert all(torch.equal(p, b) for p, b in zip(arguments[1], before, strict=True))


def test_shared_gradients_cannot_be_reset(backend):
    arguments = list(step_arguments())
    arguments[2] = [arguments[2][0]] * 3
    with pytest.raises(RuntimeError, match="share one gradient tensor"):
        backend.step_(*arguments)


def test_what_goes_into_a_graph_is_written_by_kernels(backend):
    """Not copied from host memory, which may be gone when the graph runs."""
    from deepfast.kernels import table

    values = [0, 1, -1, 2**40 + 3, -(2**62), 2**31, 2**32 - 1] * 50
    assert table._written(values, torch.device("cpu")).tolist() == values
    words = [table._disguised(word) for word in (0, 1, 16, 2**31, 2**32 - 1, -5)]
    assert all(word % 2 == 1 and word > 2**32 for word in words), "one compilation for all of them"


def test_collectives_between_processes(tmp_path):
    """Over memory that both map, as the CUDA kernels' test has it: same checks, same reference, same bits."""
    said = heard_of_ranks(2, tmp_path, "comm_ranks.py", "triton")
    assert [failures(said, check) for check in wanted(2, "triton") if failures(said, check)] == []


def test_sharded_engines(tmp_path):
    """The step writes the weights of both, and sums are scattered by the kernels."""
    said = heard_of_ranks(2, tmp_path, "zero_played.py", "triton")
    assert [failures(said, check) for check in said[0] if failures(said, check)] == []
