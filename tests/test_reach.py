"""How often each rank's figures are counted: what the ranks of larger meshes would add up, one after the other."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfast.optim.reach import Reach, say_distinct
from deepfast.optim.shards import Shards, groups_over

NAMES = ("pp", "dp", "tp")


@pytest.fixture
def as_ranks():
    """Calls a function as each rank of a world in turn, in which collectives do nothing."""

    def call(function, world):
        out = []
        for rank in range(world):
            dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
            try:
                out.append(function(rank))
            finally:
                dist.destroy_process_group()
        return out

    yield call
    if dist.is_initialized():
        dist.destroy_process_group()


def summed(figures, groups):
    """What each rank has after the sums over its groups, one after the other. groups: those of each rank, as ranks."""
    figures = list(figures)
    for nth in range(max(map(len, groups))):
        figures = [sum(figures[r] for r in own[nth]) if nth < len(own) else figures[at]
                   for at, own in enumerate(groups)]  # fmt: skip
    return figures


def total(as_ranks, world, make):
    """The sum that all ranks have; make(): shards, groups that the parameter is distinct over, others that were said
    of; and what is distinct of it here, the tensor's name, whose figure is 1."""

    def one(rank):
        shards, distinct, said, name = make(rank)
        reach = Reach([(shards, distinct)], said)
        share, sign = reach._weights[shards, distinct]
        return share, sign, [dist.get_process_group_ranks(group) for group in reach.groups], name

    shares, signs, groups, names = zip(*as_ranks(one, world), strict=True)
    found = summed(shares, groups)
    assert max(found) - min(found) < 1e-12, found
    assert abs(summed(signs, groups)[0]) < 1e-12
    assert found[0] == pytest.approx(len(set(names))), (found[0], set(names))
    return groups


def mesh_of(shape, names=NAMES):
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])


@pytest.mark.parametrize("over", [(), ("pp",), ("pp", "tp")])
@pytest.mark.parametrize("names", [c for n in (1, 2, 3) for c in itertools.combinations(NAMES, n)])
def test_a_part_of_a_mesh(as_ranks, names, over):
    """Each part of it, cut and copied in each way; the rest is the same unless something else is said."""
    for shape in ((2, 2, 2), (2, 3, 1)):
        for placements in itertools.product((Shard(0), Replicate()), repeat=len(names)):

            def make(rank, shape=shape, placements=placements):
                mesh = mesh_of(shape)
                cut = [n for n, placed in zip(names, placements, strict=True) if placed.is_shard()]
                # Where a mesh says that ranks have the same, they have.
                said = [n for n in over if n not in names or n in cut]
                place = tuple(mesh.get_local_rank(n) for n in sorted({*cut, *said}))
                groups = tuple(mesh.get_group(n) for n in said)
                return Shards(mesh[names], placements), groups, groups, place

            assert all(len(own) == 1 for own in total(as_ranks, shape[0] * shape[1] * shape[2], make))


def test_plain_parameters(as_ranks):
    for over in ((), ("tp",), ("dp", "tp"), NAMES):

        def make(rank, over=over):
            mesh = mesh_of((2, 2, 2))
            groups = tuple(mesh.get_group(n) for n in over)
            return None, groups, groups, tuple(mesh.get_local_rank(n) for n in over)

        total(as_ranks, 8, make)


def test_groups_that_no_mesh_has(as_ranks):
    """Stages whose meshes are their own, pairs between them; and one group of all, beside meshes of any kind."""

    def stages(rank):
        meshes = [dist.DeviceMesh("cpu", list(range(4 * i, 4 * i + 4))) for i in range(2)]
        pairs = [dist.new_group([i, i + 4]) for i in range(4)]
        pair = pairs[rank % 4]
        return Shards(meshes[rank // 4], (Shard(0),)), (pair,), (pair,), rank

    assert {tuple(map(len, own)) for own in total(as_ranks, 8, stages)} == {(4, 2)}

    def replicas_in_a_stage(rank):
        meshes = [dist.DeviceMesh("cpu", list(range(4 * i, 4 * i + 4))) for i in range(2)]
        return Shards(meshes[rank // 4], (Replicate(),)), (dist.group.WORLD,), (dist.group.WORLD,), rank // 4

    assert {tuple(map(len, own)) for own in total(as_ranks, 8, replicas_in_a_stage)} == {(8,)}

    def overlapping(rank):
        """Groups that have more than this rank in common: halves, and halves across them."""
        halves = [dist.new_group(ranks) for ranks in ([0, 1, 2, 3], [4, 5, 6, 7])]
        across = [dist.new_group(ranks) for ranks in ([0, 1, 4, 5], [2, 3, 6, 7])]
        said = halves[rank // 4], across[rank % 4 // 2]
        return None, said, said, rank

    def cut_beside_overlapping(rank):
        meshes = [dist.DeviceMesh("cpu", list(range(4 * i, 4 * i + 4))) for i in range(2)]
        across = [dist.new_group(ranks) for ranks in ([0, 1, 4, 5], [2, 3, 6, 7])]
        return Shards(meshes[rank // 4], (Shard(0),)), (), (across[rank % 4 // 2],), rank

    def said_more_than_once(rank):
        """What follows from two of the groups does not count again by the third."""
        ways = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]]]
        made = [[(ranks, dist.new_group(ranks)) for ranks in way] for way in ways]
        said = tuple(group for way in made for ranks, group in way if rank in ranks)
        return None, said, (*said, dist.group.WORLD), rank

    total(as_ranks, 4, said_more_than_once)
    total(as_ranks, 8, overlapping)
    total(as_ranks, 8, cut_beside_overlapping)

    def of_uneven_stages(rank):
        meshes = [dist.DeviceMesh("cpu", ranks) for ranks in ([0, 1, 2], [3])]
        return Shards(meshes[rank // 3], (Shard(0),)), (dist.group.WORLD,), (dist.group.WORLD,), rank

    total(as_ranks, 4, of_uneven_stages)


def test_meshes_smaller_than_the_world(as_ranks):
    """Dimension by dimension, or at once where somebody has flattened them."""

    def sizes(rank):
        meshes = [dist.DeviceMesh("cpu", torch.arange(4).view(2, 2) + 4 * i, mesh_dim_names=("a", "b")) for i in (0, 1)]
        mesh = meshes[rank // 4]
        kind = Shards(mesh, (Shard(0), Replicate())), ()
        before = Reach([kind]).groups
        for other in meshes:
            other._flatten("ab")
        after = Reach([kind]).groups
        assert len(groups_over(mesh, [0, 1])) == 1
        assert groups_over(mesh, [1]) == [mesh.get_group(1)]
        assert dist.get_process_group_ranks(after[0]) == list(range(rank // 4 * 4, rank // 4 * 4 + 4))
        return [[dist.get_world_size(group) for group in groups] for groups in (before, after)]

    assert as_ranks(sizes, 8) == [[[2, 2], [4]]] * 8


def test_the_order_is_that_of_the_parameters(as_ranks):
    """Not that of the gradients, nor of what was said first."""

    def order(rank):
        pairs = [dist.new_group([i, i + 4]) for i in range(4)]
        mesh = [dist.DeviceMesh("cpu", list(range(4 * i, 4 * i + 4))) for i in range(2)][rank // 4]
        placed = torch.distributed.tensor.DTensor.from_local(torch.zeros(2), mesh, (Shard(0),), run_check=False)
        optimizer = SimpleNamespace(param_groups=[{"params": [torch.zeros(2)]}, {"params": [placed]}], _distinct=())
        say_distinct(optimizer, pairs[rank % 4], None)
        return [dist.get_process_group_ranks(group) for group in Reach.of(optimizer).groups]

    for rank, groups in enumerate(as_ranks(order, 8)):
        first = rank // 4 * 4
        assert groups == [[first, first + 1, first + 2, first + 3], [rank % 4, rank % 4 + 4]]


def test_a_process_alone_reaches_nobody():
    assert Reach.of(torch.optim.SGD([torch.zeros(1)], lr=0.1)).groups == ()
