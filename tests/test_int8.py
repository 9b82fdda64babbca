"""Moments in 8 bits: what the code promises of a value, and what is left of an update after thousands of steps."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from cases import BACKENDS, HALVES, HYPER, NAMES, OURS, TYPICAL, give_gradients, parameters
from torch import Tensor, nn

import deepfast
from deepfast import ops, reference
from deepfast.reference import pack, packed_size, unpack
from deepfast.reference.noise import dither

SIGNED, POSITIVE = torch.int8, torch.uint8
SHAPES = [(70, 33), (5,), (), (0, 3), (63,), (64,), (65,), (4097,), (3, 2000)]
OPTIONS = {**TYPICAL, "AdamW": {"weight_decay": 0.1}}  # not amsgrad


def spread(numel: int, sigma: float, exponent: float = 0.0, seed: int = 0) -> Tensor:
    """fp32 values of both signs, of lognormal size."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(sigma * torch.randn(numel, generator=g, dtype=torch.float64))
    return (torch.randn(numel, generator=g, dtype=torch.float64) * size * 10.0**exponent).float()


def chances(numel: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << 32, (numel,), generator=torch.Generator().manual_seed(seed))


def test_a_moment_takes_1_03_bytes_an_element():
    p = nn.Parameter(torch.zeros(1000, 64))
    optimizer = deepfast.AdamW([p], state_dtype="int8")
    p.grad = torch.ones_like(p)
    optimizer.step()
    held = {name: t.nbytes / p.numel() for name, t in optimizer.state[p].items() if name != "step"}
    assert held == {"exp_avg": 66 / 64, "exp_avg_sq": 66 / 64}


@pytest.mark.parametrize("exponent", [-44, -38, -30, -10, 0, 10, 30, 37])
@pytest.mark.parametrize("sigma", [0, 2, 6])
def test_values_come_back_near_what_they_were(sigma, exponent):
    x = spread(10_000, sigma, exponent)
    x = x[x.abs() < 1.875 * 2.0**127]
    groups = torch.nn.functional.pad(x.abs(), (0, -len(x) % 64)).view(-1, 64)
    greatest = groups.amax(1).repeat_interleave(64)[: len(x)].double()
    back = unpack(pack(x, SIGNED, chances(len(x))), x.shape).double()
    even = (greatest * 2.0**-15.5).clamp(min=2.0**-126)  # below this steps are even
    assert ((back - x.double()).abs() <= (x.abs().double() + even) / 8).all()
    assert ((back == 0) | (torch.sign(back) == torch.sign(x.double()))).all()
    squares = x.double().square().float().clamp(max=1.8 * 2.0**127)
    back = unpack(pack(squares, POSITIVE, chances(len(x))), x.shape)
    assert torch.equal(back == 0, squares == 0)  # a second moment that is not zero is never zero
    greatest = torch.nn.functional.pad(squares, (0, -len(x) % 64)).view(-1, 64).amax(1).repeat_interleave(64)[: len(x)]
    # Values of a group span 32 octaves, and all that lies further below is raised to the least of them.
    inside = (squares >= greatest * 2.0**-31) & (squares >= 2.0**-125)
    error = (back.double() - squares.double()).abs()
    assert (error[inside] <= squares[inside].double() / 8).all()
    assert (back <= torch.maximum(squares * 1.125, greatest * 2.0**-31).clamp(min=2.0**-125)).all()


def test_on_average_a_value_is_what_it_was():
    x = spread(64 * 8, 1)
    for dtype, value in ((SIGNED, x), (POSITIVE, x.square())):
        drawn = torch.stack([unpack(pack(value, dtype, chances(len(x), seed)), x.shape) for seed in range(1000)])
        mean, deviation = drawn.double().mean(0), drawn.double().std(0) / 1000**0.5
        off = (mean - value.double()).abs()
        bend = value.abs().double() * 2.0**-9  # a step's middle in the pattern is not quite its middle
        assert (off <= 5 * deviation + bend).all()


@pytest.mark.parametrize("dtype", [SIGNED, POSITIVE])
def test_what_has_been_unpacked_comes_back_as_it_is(dtype):
    for seed in range(20):
        x = spread(64 * 50 + 7, seed % 5, 3 * seed - 44, seed)
        x = x if dtype == SIGNED else x.abs()
        x[seed] = 0
        once = unpack(pack(x, dtype, chances(len(x), seed)), x.shape)
        assert torch.equal(unpack(pack(once, dtype), x.shape), once)


def test_infinities_and_nan_stay_and_zeros_are_zeros():
    x = torch.ones(192)
    x[3], x[70], x[100] = torch.inf, torch.nan, 0.0
    for dtype in (SIGNED, POSITIVE):
        back = unpack(pack(x, dtype, chances(192)), x.shape)
        assert back[3] == torch.inf
        assert back[70].isnan()
        assert back[[i for i in range(192) if i not in (3, 70)]][:2].isfinite().all()
        torch.testing.assert_close(back[128:], x[128:], rtol=0.125, atol=0)
        zeros = pack(torch.zeros(130), dtype, chances(130))
        assert (unpack(zeros, torch.Size([130])) == 0).all()
    back = unpack(pack(-x, SIGNED, chances(192)), x.shape)
    assert back[3] == -torch.inf
    assert (unpack(torch.zeros(packed_size(70), dtype=SIGNED), torch.Size([70])) == 0).all()  # as state begins
    assert (unpack(torch.zeros(packed_size(70), dtype=POSITIVE), torch.Size([70])) == 0).all()


def test_a_group_does_not_know_the_others():
    x, chance = spread(640, 2), chances(640)
    for dtype in (SIGNED, POSITIVE):
        value = x if dtype == SIGNED else x.square()
        whole, part = pack(value, dtype, chance), pack(value[128:256], dtype, chance[128:256])
        assert torch.equal(whole[128:256], part[:128])
        assert torch.equal(whole[640 + 4 : 640 + 8], part[128:])


def test_dither_is_another_at_each_step_and_of_each_moment_and_spread_evenly():
    seen = [dither(7, torch.tensor(float(step)), k, 0, 1 << 16) for step in range(3) for k in range(2)]
    for bits in seen:
        counts = torch.bincount(bits >> 24, minlength=256).double()
        assert (counts - 256).abs().max() < 256  # more even than random bits would be
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert (a != b).all()
    steps = torch.stack([dither(7, torch.tensor(float(step)), 0, 5, 64) for step in range(4000)]).double() / 2**32
    assert (steps.mean(0) - 0.5).abs().max() < 0.025
    centred = steps - steps.mean(0)
    for apart in (1, 2, 7):  # from step to step they are independent
        assert ((centred[apart:] * centred[:-apart]).mean(0) / centred.var(0)).abs().max() < 0.09
    assert torch.equal(dither(7, torch.tensor(3.0), 1, 100, 50), dither(7, torch.tensor(3.0), 1, 0, 150)[100:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_same_codes_whoever_steps(name, dtype, backend):
    runs = []
    for which in (backend, "reference"):
        params = parameters(dtype, SHAPES)
        params[0] = nn.Parameter(params[0].detach().t())  # its groups are its rows
        optimizer = OURS[name](params, lr=1e-2, state_dtype="int8", backend=which, max_grad_norm=3.0, **OPTIONS[name])
        for i in range(4):
            give_gradients(params, seed=i)
            if i == 2:
                params[-1].grad = None
            optimizer.step()
        runs.append((params, optimizer))
    (ours, mine), (theirs, other) = runs
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        for moment in mine._moments(mine.param_groups[0]):
            a, b = mine.state[p][moment], other.state[q][moment]
            assert a.dtype == b.dtype == reference.grouped_dtype(moment)
            assert a.shape == b.shape == (packed_size(p.numel()),)
            # What is coded differs now and then by a rounding of fp32's, and turns another way by that.
            assert (a != b).sum() <= 1 + 0.002 * len(a)
        assert mine.state[p]["step"] == (3 if p is ours[-1] else 4)


def updates(sigma: float, exponents: list[int], steps: int, looked_at: tuple[int, ...], **options) -> dict[int, Tensor]:
    """{step: [form, rms, element]}: what fp32 and int8 make of the same gradients of these sizes."""
    n = 64 * 64
    g = torch.Generator().manual_seed(int(sigma))
    scales = [torch.exp(sigma * torch.randn(n, generator=g)) * 10.0**e for e in exponents]
    drift = torch.randn(len(scales), n, generator=g) / 4
    lists = [[nn.Parameter(torch.zeros(n)) for _ in scales] for _ in range(2)]
    forms = [
        deepfast.AdamW(ps, lr=1.0, weight_decay=0.0, eps=1e-14, **o) for ps, o in zip(lists, ({}, options), strict=True)
    ]
    found = {}
    for step in range(1, steps + 1):
        for k, scale in enumerate(scales):
            grad = (torch.randn(n, generator=g) + drift[k]) * scale
            for params in lists:
                params[k].grad = grad
                params[k].data.zero_()
        for optimizer in forms:
            optimizer.step()
        if step in looked_at:
            found[step] = torch.stack([torch.stack([p.detach().clone() for p in params]) for params in lists])
    return found


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_updates_are_those_of_fp32_after_2000_steps(sigma):
    found = updates(sigma, [-2, -4, -6, -8], 2000, (100, 2000), state_dtype="int8", betas=(0.9, 0.999))
    for step, (exact, ours) in found.items():
        ratio = ours.norm(dim=1) / exact.norm(dim=1)
        assert (ratio - 1).abs().max() < 0.05, (step, ratio)
        typical = exact.square().mean(1, keepdim=True).sqrt()
        assert (ours.abs() / torch.maximum(exact.abs(), typical)).max() < 3, step
        cosine = (ours * exact).sum(1) / (ours.norm(dim=1) * exact.norm(dim=1))
        assert cosine.min() > 0.98, (step, cosine)


def test_rounding_to_nearest_would_not_do():
    """So that the test above is known to see it: a second moment of beta2 = 0.999 goes back to its code each step."""
    v, exact = torch.full((64,), 1.0), torch.full((64,), 1.0)
    by_chance = v.clone()
    for step in range(1000):
        exact *= 0.999
        v = unpack(pack(v * 0.999, POSITIVE), v.shape)
        # Beside a greater value a step is an eighth of an octave.
        by_chance[0] = v[0] = 2.0**20
        drawn = dither(1, torch.tensor(float(step)), 1, 0, 64)
        by_chance = unpack(pack(by_chance * 0.999, POSITIVE, drawn), v.shape)
    assert (v[1:] == 1).all()
    assert (by_chance[1:].mean() / exact[1:].mean() - 1).abs() < 0.1


def test_amsgrad_in_8_bits_is_refused_and_its_first_moment_is_not():
    for form in ("int8", {"exp_avg_sq": "int8"}, {"max_exp_avg_sq": "int8"}):
        with pytest.raises(ValueError, match="amsgrad with a second moment in 8 bits"):
            deepfast.AdamW(parameters(), amsgrad=True, state_dtype=form)
    optimizer = deepfast.AdamW(parameters(), amsgrad=True, state_dtype={"exp_avg": "int8"})
    give_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    optimizer = deepfast.AdamW(parameters(), state_dtype="int8")
    optimizer.param_groups[0]["amsgrad"] = True
    give_gradients(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="amsgrad with a second moment in 8 bits"):
        optimizer.step()


def run(params, steps, first=0, **options):
    optimizer = deepfast.AdamW(params, lr=1e-2, **options)
    go_on(optimizer, steps, first)
    return optimizer


def go_on(optimizer, steps, first=0):
    params = optimizer.param_groups[0]["params"]
    for i in range(first, first + steps):
        give_gradients(params, seed=i, scale=10.0 ** (i % 3 - 4))
        optimizer.step()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(dtype, compact):
    params = parameters(dtype, SHAPES)
    optimizer = run(params, 5, state_dtype="int8")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(compact=compact), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["state"][0]["exp_avg"].dtype == (SIGNED if compact else torch.float32)
    assert state["state"][0]["exp_avg"].shape == ((packed_size(70 * 33),) if compact else (70, 33))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = deepfast.AdamW(others, lr=1e-2, state_dtype="int8")
    other.load_state_dict(state)
    go_on(optimizer, 4, 5), go_on(other, 4, 5)
    assert all(map(torch.equal, params, others))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])
    copied = copy.deepcopy(optimizer)
    assert copied.state_dtype == "int8"


@pytest.mark.parametrize("form", ["fp32", "bf16", {"exp_avg": "int8"}])
@pytest.mark.parametrize("compact", [False, True])
def test_moments_move_into_and_out_of_8_bits(form, compact):
    params = parameters(shapes=SHAPES)
    optimizer = run(params, 3, state_dtype="int8")
    exact = [unpack(optimizer.state[p]["exp_avg_sq"], p.shape) for p in params]
    other = deepfast.AdamW([nn.Parameter(p.detach().clone()) for p in params], state_dtype=form)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict(compact=compact)))
    back = deepfast.AdamW([nn.Parameter(p.detach().clone()) for p in params], lr=1e-2, state_dtype="int8")
    back.load_state_dict(copy.deepcopy(other.state_dict(compact=compact)))
    for p, q, r, value in zip(params, *(o.param_groups[0]["params"] for o in (other, back)), exact, strict=True):
        there = other.state[q]["exp_avg_sq"]
        assert torch.equal(there, value.to(there.dtype))
        here = unpack(back.state[r]["exp_avg_sq"], p.shape)
        assert torch.equal(here, value) if form != "bf16" else torch.allclose(here, value, rtol=2.0**-7)
    optimizer.state_dtype = form  # and between steps
    optimizer.param_groups[0]["lr"] = 0.0
    go_on(optimizer, 1)
    assert optimizer.state[params[0]]["exp_avg_sq"].shape == params[0].shape
    optimizer.state_dtype = "int8"
    go_on(optimizer, 1)
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == POSITIVE


def test_torchs_optimizer_takes_the_state_and_gives_it_back():
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    optimizer = run(params, 3, state_dtype="int8")
    peer = torch.optim.AdamW(others, lr=1e-2)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {p: unpack(optimizer.state[p]["exp_avg"], p.shape) for p in params}
    for p, q in zip(params, others, strict=True):
        assert torch.equal(peer.state[q]["exp_avg"], before[p])
    optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    for p in params:
        assert torch.equal(unpack(optimizer.state[p]["exp_avg"], p.shape), before[p])


def test_what_does_not_fit_is_refused():
    optimizer = run(parameters(shapes=[(100,)]), 1, state_dtype="int8")
    state = copy.deepcopy(optimizer.state_dict(compact=True))
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-2]
    with pytest.raises(ValueError, match=r"the loaded 'exp_avg' has shape \(130,\), its parameter \(100,\)"):
        optimizer.load_state_dict(state)
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"][:-2].clone()
    give_gradients([p])
    with pytest.raises(RuntimeError, match="a moment in 8 bits of 100 elements must be 132 contiguous bytes"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_follow_a_parameter_that_is_laid_anew(backend):
    (p,) = parameters(torch.bfloat16, [(6, 4, 5, 7)])
    optimizer = deepfast.AdamW([p], lr=1e-2, state_dtype="int8", backend=backend)
    for i in range(4):
        give_gradients([p], seed=i)
        if i == 2:
            p.data = p.data.to(memory_format=torch.channels_last)
        before = optimizer.state_dict()["state"].get(0)
        optimizer.step()
        now = optimizer.state_dict()["state"][0]
        if before:
            average = before["exp_avg"].lerp(p.grad.float(), 0.1)
            torch.testing.assert_close(now["exp_avg"], average, rtol=0.13, atol=1e-4)
        assert now["exp_avg"].stride() == p.stride()
    # Codes alone do not say in which order they are.
    assert optimizer.state_dict(compact=True)["state"][0]["exp_avg"].dtype == torch.float32
    q = nn.Parameter(p.detach().contiguous())
    other = deepfast.AdamW([q], lr=1e-2, state_dtype="int8", backend=backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict(compact=True)))
    torch.testing.assert_close(other.state_dict()["state"][0]["exp_avg"], now["exp_avg"], rtol=0.13, atol=1e-4)
    copied = copy.deepcopy(optimizer)
    assert torch.equal(copied.state_dict()["state"][0]["exp_avg"], now["exp_avg"])


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_the_codes_as_they_are(name):
    params = parameters(torch.float16, SHAPES)
    optimizer = OURS[name](params, lr=1e-2, state_dtype="int8", **OPTIONS[name])
    scaler = deepfast.LossScaler(init_scale=2.0)
    for i in range(3):
        give_gradients(params, seed=i)
        if i == 2:
            params[1].grad[0] = torch.inf
        before = copy.deepcopy(optimizer.state_dict(compact=True)["state"])
        scaler.step(optimizer)
        scaler.update()
    now = optimizer.state_dict(compact=True)["state"]
    assert all(torch.equal(now[i][key], value) for i, state in before.items() for key, value in state.items())


def test_moments_of_types_that_no_kernel_takes_are_of_their_type():
    params = [nn.Parameter(torch.randn(5, dtype=dtype)) for dtype in (torch.float64, torch.complex64)]
    optimizer = deepfast.Adam(params, state_dtype="int8")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float64, torch.complex64]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_rounded_by_chance_only_where_that_is_asked_for(backend, rounding):
    runs = []
    for which in (backend, "reference"):
        params = parameters(torch.bfloat16, SHAPES)
        run(params, 3, state_dtype="int8", backend=which, master="none", rounding=rounding)
        runs.append(params)
    differ = sum(int((p != q).sum()) for p, q in zip(*runs, strict=True))
    assert differ <= 0.002 * sum(p.numel() for p in runs[0])


@pytest.mark.parametrize("rule", [rule for rule, what in reference.RULES.items() if what.moments])
def test_chance_is_that_of_the_place_in_the_whole_parameter(rule):
    """A part has the bits of the whole's groups, whatever its rank: for the kernels as for plain torch."""
    what = reference.RULES[rule]
    forms = [POSITIVE] if rule == "adagrad" else [SIGNED, POSITIVE, POSITIVE][: what.moments]
    hyper = torch.tensor([[1.0, *HYPER[rule]]], dtype=torch.float64)
    found = []
    for plans in (ops.native, reference):
        for cut in (False, True):
            g = torch.Generator().manual_seed(1)
            p, grad = torch.randn(2, 2000, generator=g).unbind()
            ends = [0, 1024, 1088, 2000] if cut else [0, 2000]
            sizes = [end - begin for begin, end in itertools.pairwise(ends)]
            moments = [[torch.zeros(packed_size(n), dtype=form) for n in sizes] for form in forms]
            steps = [torch.tensor(3.0) for _ in sizes]
            parts = [t.clone() for t in p.split(sizes)]
            flat = [t for each in moments for t in each]
            plan = plans.Plan(
                rule, parts, [torch.empty(0)] * len(sizes), flat, steps, torch.zeros(3).int()[: len(sizes)]
            )
            plan.by_chance([11] * len(sizes), [first + 4096 for first in ends[:-1]], False)
            assert plan.gather([t.clone() for t in grad.split(sizes)], 0) == len(sizes)
            record = torch.tensor([1.0, 0.0, 0.0])
            plan.step(hyper, [], record, plan.norms(hyper, [], record) if plan.needs_norms() else None)
            found.append([torch.cat([unpack(t, torch.Size([n])) for t, n in zip(each, sizes, strict=True)])
                          for each in moments])  # fmt: skip
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a != b).sum() <= 4  # by a rounding of fp32's
