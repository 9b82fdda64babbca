"""Moments in 8 bits, the code itself: what it promises of a value, and the chance by which it rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import HYPER
from torch import Tensor

from deepfast import ops, reference
from deepfast.reference import pack, packed_size, unpack
from deepfast.reference.noise import dither

SIGNED, POSITIVE = torch.int8, torch.uint8


def spread(numel: int, sigma: float, exponent: float = 0.0, seed: int = 0) -> Tensor:
    """fp32 values of both signs, of lognormal size."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(sigma * torch.randn(numel, generator=g, dtype=torch.float64))
    return (torch.randn(numel, generator=g, dtype=torch.float64) * size * 10.0**exponent).float()


def chances(numel: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << 32, (numel,), generator=torch.Generator().manual_seed(seed))


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


def test_rounding_to_nearest_would_not_do():
    """A second moment of beta2 = 0.999 goes back to its code each step."""
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
