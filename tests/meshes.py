"""Parameters that lie in all ways over the meshes of four ranks, and what one process would have in their stead."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

SHAPES = [(9, 6), (3, 5), (1, 4), (70, 3)]  # uneven, and with less rows than ranks


class Meshes:
    """How a parameter may lie: mesh, placements, and the group over whose ranks it is another one."""

    def __init__(self) -> None:
        def mesh(*names: str) -> DeviceMesh:
            return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)

        self.flat = dist.init_device_mesh("cpu", (4,))
        self.tp, self.ep, hsdp = mesh("dp", "tp"), mesh("ep", "fsdp"), mesh("replicate", "shard")
        made = [DeviceMesh("cpu", ranks) for ranks in ([0, 2], [1, 3])]  # every rank makes all groups
        self.alone = made[dist.get_rank() % 2]
        self.pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]
        rows, columns = Shard(0), Shard(1)
        self.ways = {
            "rows": (self.flat, (rows,), None),
            "columns": (self.flat, (columns,), None),
            "replicas": (self.flat, (Replicate(),), None),
            "hsdp": (hsdp, (Replicate(), rows), None),
            "fsdp and tp": (self.tp, (rows, columns), None),
            "tp": (self.tp, (Replicate(), columns), None),
            "beside tp": (self.tp["dp"], (rows,), None),  # the same on all ranks of "tp"
            "expert": (self.ep["fsdp"], (rows,), self.ep["ep"]),
            "expert alone": (self.alone, (rows,), self.pair),  # on a mesh that is no part of another
            "plain": (None, None, None),
            "plain part": (None, None, self.tp["tp"]),
            "plain parts": (None, None, self.flat),
        }


class World:
    """This rank's ``params`` and ``whole``, all those of all ranks as plain tensors."""

    def __init__(self, meshes: Meshes, ways: list[str], dtype: torch.dtype = torch.float32) -> None:
        self.ways = [meshes.ways[way] for way in ways]
        self.params: list[nn.Parameter] = []
        self.whole: list[nn.Parameter] = []
        self.mine: list[int] = []  # where each of ``params`` is in ``whole``
        for (_, _, group), shape in zip(self.ways, itertools.cycle(SHAPES), strict=False):
            group = group.get_group() if isinstance(group, DeviceMesh) else group
            count, place = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
            self.mine.append(len(self.whole) + place)
            self.whole += [nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(count)]
        with torch.no_grad():
            for p, value in zip(self.whole, self.tensors(0), strict=True):
                p.copy_(value)
        self.params = [nn.Parameter(self.cut(n, self.whole[i].detach().clone())) for n, i in enumerate(self.mine)]

    def tensors(self, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return [scale * torch.randn(p.shape, generator=g) for p in self.whole]

    def cut(self, number: int, t: torch.Tensor, placed: str = "") -> torch.Tensor:
        """``t`` as parameter ``number`` lies, or as its gradient may."""
        mesh, placements, _ = self.ways[number]
        if mesh is None:
            return t
        if placed == "partial":
            return DTensor.from_local(t / mesh.size(), mesh, (Partial(),) * mesh.ndim)
        if placed == "replicas":
            return DTensor.from_local(t, mesh, (Replicate(),) * mesh.ndim)
        return distribute_tensor(t, mesh, placements)

    def give(self, seed: int, scale: float = 1.0, without: tuple[int, ...] = (), placed: str = "") -> None:
        """Gradients for all; without: numbers of parameters that have none."""
        grads = self.tensors(seed, scale)
        for p, g in zip(self.whole, grads, strict=True):
            p.grad = g.to(p.dtype)
        for number, (p, i) in enumerate(zip(self.params, self.mine, strict=True)):
            p.grad = None if number in without else self.cut(number, grads[i].to(p.dtype).clone(), placed)
            if number in without:
                self.whole[i].grad = None

    def say(self, optimizer: torch.optim.Optimizer) -> None:
        """What no DTensor tells."""
        said = [group for _, _, group in self.ways]
        for group in dict.fromkeys(group for group in said if group is not None):
            optimizer.distinct_over(group, [p for p, own in zip(self.params, said, strict=True) if own is group])

    def differ(self, tolerance: float = 1e-6) -> None:
        """Raises where this rank has not what one process would have."""
        for p, i in zip(self.params, self.mine, strict=True):
            found = p.full_tensor() if isinstance(p, DTensor) else p
            torch.testing.assert_close(found.detach(), self.whole[i].detach(), rtol=tolerance, atol=tolerance)


def same_bits(t: torch.Tensor) -> bool:
    """Whether all ranks have the same."""
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.contiguous())
    return all(torch.equal(a.reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)) for a in found)
