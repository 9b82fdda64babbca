"""Buckets cut into parts, and what a rule wants to know of whole parameters of which each rank has a part."""

from __future__ import annotations

import random

import pytest
import torch

from deepfast import ops, reference
from deepfast.engine.layout import BLOCK, Layout
from deepfast.optim.parts import Parts

HYPER = torch.tensor([[1.0, 0.1, 0.9, 0.99, 1e-6, 0.01, 0.0, 10.0]], dtype=torch.float64)  # sign, then LAMB's own


class Played(Parts):
    """One rank's side of several that take turns: sums are added up by the caller."""

    def __init__(self, begin: int, numel: int) -> None:
        self.extents, self.shown = (begin, numel), None

    def extent(self, part):
        return self.extents

    def sum_(self, t):
        self.shown = t.clone()
        return t


STATE = []  # a plan does not keep it alive


def plan_of(p, g, backend=ops.native):
    state = [
        torch.empty(0),
        torch.zeros_like(p),
        torch.zeros_like(p),
        torch.zeros(()),
        torch.zeros(1, dtype=torch.int32),
    ]
    master, *moments, count, group = state
    STATE.extend((p, g, *state))
    made = backend.Plan("lamb", [p], [master], moments, [count], [0] if backend is reference else group)
    made.gather([g], 0)
    return made


@pytest.mark.parametrize("numel", [1, 5000, 3 * BLOCK, 300 * 1024 + 77, 600 * 1024])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_norms_of_parts_are_those_of_the_whole(numel, ranks, seed):
    """To the last bit of fp64, also where there are more blocks than are added in one row."""
    g = torch.Generator().manual_seed(seed)
    # Of sizes between which fp64 has to round: else sums of fp32 values are exact, in whatever order.
    p = (
        torch.randn(numel, generator=g)
        * 10 ** (4 * torch.rand(numel // 512 + 1, generator=g) - 2).repeat_interleave(512)[:numel]
    )
    g, record = p.flip(0), torch.tensor([1.0, 0.0, 0.0])
    whole = plan_of(p, g).norms(HYPER, [], record)
    layout, shown = Layout.of([p], ranks), []
    for rank in range(ranks):
        begin, end = layout.part(0, p, rank)
        part = p[begin:end].clone()
        one = Played(begin, numel)
        alone = one.norms(plan_of(part, g[begin:end].clone()), [part], HYPER, [], record)
        shown.append(one.shown)
        assert torch.equal(alone, whole) == (end - begin == numel)
    together = Played(begin, numel)
    together.sum_ = lambda _: torch.stack(shown).sum(0)
    assert torch.equal(together.norms(plan_of(part, part), [part], HYPER, [], record), whole)


def test_where_blocks_are_not_told_apart_sums_are_added():
    p, record = torch.randn(100), torch.tensor([1.0, 0.0, 0.0])
    played = Played(0, 100)
    found = played.norms(plan_of(p, p.clone(), reference), [p], HYPER, [], record)
    assert torch.equal(found, played.shown)


def test_cuts_fall_between_blocks_of_a_parameter():
    chance = random.Random(0)
    for _ in range(300):
        some = (0, 1, 7, 300, 4095, 4096, 4097, 9000, 50_000, 200_000)
        sizes = chance.choices(some, k=chance.randint(1, 12))
        params = [torch.empty(n) for n in sizes]
        for ranks in (1, 2, 3, 7):
            layout = Layout.of(params, ranks)
            parts = [[layout.part(nth, p, rank) for rank in range(ranks)] for nth, p in enumerate(params)]
            for p, own in zip(params, parts, strict=True):
                cover = [i for begin, end in own if begin < end for i in (begin, end)]
                assert cover[:1] + cover[-1:] == ([0, p.numel()] if p.numel() else [])
                inner = cover[1:-1]
                assert inner[0::2] == inner[1::2]
                assert all(cut % BLOCK == 0 for cut in inner)
            ends = [at + n for at, n in zip(layout.offsets, sizes, strict=True)]
            assert all(end <= at for end, at in zip(ends, layout.offsets[1:], strict=False)), "none overlap"
            covered = sum(sizes) + sum(end - begin for begin, end in layout.gaps(params, layout.chunk * ranks))
            assert covered == layout.chunk * ranks
            assert layout.chunk * ranks >= layout.numel
            assert layout.chunk % BLOCK == 0
