"""Over which ranks the figures of an optimizer's gradients are added up, and how often each of them is counted.

What lies where is said by the DTensors; what they cannot say, ``Optimizer.distinct_over``. Ranks that hold the same
gradient each add their share of it, 1/k of k ranks: so one sum over all ranks at once does for all parameters, however
they lie, every rank gets the same bits, and no rank misses another's overflow, not even that of a replica.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from deepfast import graphs
from deepfast.optim.shards import Shards, groups_over
from deepfast.optim.warned import warn

Kind = tuple[Shards | None, tuple[Any, ...]]
"""How a parameter lies, and over which groups it is distinct."""

_APART = 1e-3  # of the squared norm: so much no rounding makes of what is the same


class Said(NamedTuple):
    """That the ranks of ``group`` hold different parameters under the same numbers; None: under all of them."""

    group: Any
    numbers: frozenset[int] | None

    def __deepcopy__(self, _: Any) -> Said:
        return self  # a group of ranks cannot be copied


class Distinct(tuple[Said, ...]):
    """All that has been said. A copy in this process knows it, too; elsewhere there are no such groups."""

    __slots__ = ()

    def over(self, number: int) -> tuple[Any, ...]:
        """The groups whose ranks hold different parameters of this number."""
        return tuple(said.group for said in self if said.numbers is None or number in said.numbers)

    def __deepcopy__(self, _: Any) -> Distinct:
        return self

    def __reduce__(self) -> Any:
        return Distinct, ()


def say_distinct(optimizer: Any, group: Any, params: Iterable[Tensor] | None) -> None:
    """See :meth:`deepfast.optim.Optimizer.distinct_over`."""
    if hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(
                f"deepfast: distinct_over() takes one dimension of a mesh at a time (mesh['name']), got {group.ndim}"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "deepfast: distinct_over() takes a group of ranks that this rank is one of, or a DeviceMesh of one "
            f"dimension, got {group!r}"
        )
    numbers = None
    if params is not None:
        known = {id(p): number for number, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        asked = [params] if isinstance(params, Tensor) else list(params)
        for p in asked:
            if id(p) not in known:
                raise ValueError(
                    f"deepfast: distinct_over(): a parameter of shape {tuple(p.shape)} is not this optimizer's"
                )
        numbers = frozenset(known[id(p)] for p in asked)
    optimizer._distinct = Distinct((*optimizer._distinct, Said(group, numbers)))


class Reach:
    """The groups of ranks over which an optimizer's figures are added up, one after the other.

    They follow from how parameters lie, never from who has a gradient, and come in the order of the parameters: all
    ranks call the same collectives in the same order. A parameter on a part of a mesh reaches all of that mesh.
    """

    def __init__(self, kinds: Collection[Kind], said: Iterable[Any] = ()) -> None:
        """kinds: how the parameters lie. said: all groups that some of them may be distinct over."""
        meshes = dict.fromkeys(shards.mesh for shards, _ in kinds if shards is not None)
        roots = dict.fromkeys(mesh._get_root_mesh() for mesh in meshes if mesh.get_coordinate() is not None)
        with _disable_current_modes():  # a mesh keeps its ranks in a tensor
            found = [group for root in roots for group in groups_over(root, range(root.ndim))]
            self.groups, self._sets = _widest((*found, *said))
            # Where groups overlap by more than this rank, what both hold is added more than once.
            self._again = math.prod(_most_in(ranks, self._sets[:i]) for i, ranks in enumerate(self._sets))
            self._weights = {kind: self._weigh(*kind) for kind in kinds}

    @classmethod
    def of(cls, optimizer: Any) -> Reach:
        """That of any optimizer's parameters."""
        if not dist.is_initialized():
            return cls(())
        distinct: Distinct = getattr(optimizer, "_distinct", Distinct())
        params = (p for group in optimizer.param_groups for p in group["params"])
        if not distinct:
            return cls([(shards, ()) for shards in dict.fromkeys(map(Shards.of, params))])
        kinds = dict.fromkeys((Shards.of(p), distinct.over(i)) for i, p in enumerate(params))
        return cls(kinds, [said.group for said in distinct])

    @classmethod
    def of_all(cls, reaches: Sequence[Reach]) -> Reach:
        """Over the ranks of all; over none where each of them has these already."""
        if len(reaches) > 1:
            reach = cls((), [group for own in reaches for group in own.groups])
            if any(set(own._sets) != set(reach._sets) for own in reaches):
                return reach
        return cls(())

    def sum_(self, t: Tensor) -> Tensor:
        """Adds up what the ranks have, in place, a tensor of any shape."""
        for group in self.groups:
            dist.all_reduce(t, group=group)
        return t

    def statistics(self, optimizer: Any, launches: Iterable[Any], home: torch.device) -> Tensor:
        """fp64 [2], of all ranks' gradients: sum of squares, number of non-finite elements. One small sum a group."""
        found, doubted = torch.zeros(3, dtype=torch.float64, device=home), False
        for launch in launches:
            own = launch.statistics().to(home)
            share, sign = self._weights[launch.shards, launch.distinct]
            if sign:
                found[2:] += sign * own[:1]
            found[:1] += own[:1] if share == 1.0 else share * own[:1]
            found[1:2] += own[1:]
            doubted |= sign > 0
        self.sum_(found)
        if doubted and not optimizer._compared:
            _compare(optimizer, found)
        return found[:2]

    def _weigh(self, shards: Shards | None, distinct: tuple[Any, ...]) -> tuple[float, int]:
        """How much of what this rank holds of such parameters it adds to the sum, and its sign in the comparison.

        That is 1 on the first and -1 on the last of the ranks that are only taken to hold the same, and 0 elsewhere:
        what is the same cancels out.
        """
        if not self.groups or (shards is not None and shards.mesh.get_coordinate() is None):
            return 1.0, 0
        if shards is None:
            around, held, kept_by = None, frozenset((dist.get_rank(),)), 1
            copies = math.prod(map(len, self._sets)) // self._again
        else:  # outside of the mesh that theirs is a part of, nobody holds the same
            around, held = _ranks_of(shards.mesh._get_root_mesh()), _ranks_of(shards.mesh)
            replicas = (shards.mesh.size(d) for d, placed in enumerate(shards.placements) if placed.is_replicate())
            kept_by = math.prod(replicas)
            copies = kept_by * (len(around) // len(held))
        known = [held]
        for group in distinct:
            ranks = _ranks(group) if around is None else _ranks(group) & around
            copies //= len(ranks) // _most_in(ranks, known)
            known.append(ranks)
        compared = around if around is not None else self._sets[0] if len(self._sets) == 1 else held
        sign = 0 if distinct else (min(compared) in held) - (max(compared) in held)
        return 1.0 / (max(copies, kept_by) * self._again), sign


def _widest(groups: Iterable[Any]) -> tuple[tuple[Any, ...], list[frozenset[int]]]:
    """Those that no other one holds, and their ranks."""
    candidates = {group: _ranks(group) for group in groups}
    kept: dict[frozenset[int], Any] = {}
    for group, ranks in candidates.items():
        if len(ranks) > 1 and not any(other > ranks for other in candidates.values()):
            kept.setdefault(ranks, group)
    return tuple(kept.values()), list(kept)


def _ranks(group: Any) -> frozenset[int]:
    return frozenset(dist.get_process_group_ranks(group))


def _ranks_of(mesh: Any) -> frozenset[int]:
    return frozenset(mesh.mesh.flatten().tolist())


def _most_in(ranks: frozenset[int], others: Iterable[frozenset[int]]) -> int:
    """How many of ``ranks`` are in one of the others, at least this one."""
    return max((len(ranks & other) for other in others), default=1)


def _compare(optimizer: Any, found: Tensor) -> None:
    """Warns, after the first finite step, where ranks differ in what they are taken to have in common."""
    if _get_current_dispatch_mode() is not None or graphs.capturing(found.device):
        return
    squares, _, apart = found.tolist()
    if not 0.0 < squares < math.inf:
        return
    optimizer._compared = True
    if abs(apart) > _APART * squares:
        warn(
            "deepfast: parameters that are taken to be the same on several ranks have gradients that differ there; the "
            "norm counts them once. Where they are not the same (experts, stages of a pipeline, plain tensors that are "
            "parts of one), say so: optimizer.distinct_over(group, params)"
        )
