"""A sharded engine's weights, whole on every rank, and who steps which part of them (ZeRO, arXiv:1910.02054)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepfast import ops
from deepfast.comm.by_torch import gather_tensor
from deepfast.engine.layout import Layout
from deepfast.engine.parts import Part
from deepfast.optim import memory
from deepfast.optim.parts import Parts

_ALIGN = 64  # bytes


class Shards(Parts):
    """Cuts parameters into parts, one a rank, and tells all ranks the new weights.

    Ranks that see each other's memory write their part to all others in the step itself; else parts are gathered.

    Args:
        comm: a communicator, or None: torch.distributed.
        device: where the parameters are.
        reach: whether all ranks share this host's memory, and the parameters are there.
    """

    def __init__(self, comm: Any, device: torch.device, reach: bool) -> None:
        self.comm, self.reach = comm, reach
        self._device = device
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self.parts: dict[Tensor, Part] = {}  # by the whole parameter
        self._by_mine: dict[Tensor, Part] = {}
        self._homes: dict[Tensor, Tensor] = {}  # where each parameter's weights are to lie
        self._pieces: list[Tensor] = []  # [ranks, chunk] each: a bucket's weights
        self._sinks: dict[Tensor, tuple[int, ...]] = {}

    @torch.no_grad()
    def add(self, params: list[Tensor], members: list[list[int]], layouts: list[Layout]) -> None:
        """Moves the weights of buckets together, to where other ranks see them.

        Args:
            members: the indices of each bucket's parameters in ``params``; of one type. layouts: how they lie in it.
        """
        sizes = [
            -(-layout.chunk * self._ranks * params[bucket[0]].itemsize // _ALIGN) * _ALIGN
            for bucket, layout in zip(members, layouts, strict=True)
        ]
        if self.reach:
            weights = self.comm.empty(sum(sizes), torch.uint8, self._device)
            sinks = tuple(self.comm.displacements(weights))
        else:
            weights, sinks = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device), ()
        for bucket, layout, place in zip(members, layouts, weights.split(sizes), strict=True):
            dtype = params[bucket[0]].dtype
            piece = place[: layout.chunk * self._ranks * dtype.itemsize].view(dtype).zero_()
            self._pieces.append(piece.view(self._ranks, layout.chunk))
            for nth, i in enumerate(bucket):
                p, at = params[i], layout.offsets[nth]
                home = memory.view_like(_of_its_own(piece[at : at + p.numel()]), p).copy_(p)
                p.data = self._homes[p] = home
                begin, end = layout.part(nth, p, self._rank)
                # A view, so that autograd counts the writes to both together: the master knows of them.
                seen = p.detach().as_strided((end - begin,), (1,), p.storage_offset() + begin)
                mine = nn.Parameter(seen, requires_grad=p.requires_grad)
                self.parts[p] = self._by_mine[mine] = Part(p, mine, begin, end)
                self._sinks[mine] = sinks

    @torch.no_grad()
    def check(self) -> None:
        """Before a step: weights that somebody has given other memory (``.data =``) come back to theirs."""
        for p, home in self._homes.items():
            if p.data_ptr() == home.data_ptr() or not home.numel():
                continue
            if p.shape != home.shape or p.dtype != home.dtype or p.device != home.device:
                raise RuntimeError(
                    f"step(): a parameter of shape {tuple(home.shape)}, {home.dtype} on {home.device}, has become one "
                    f"of shape {tuple(p.shape)}, {p.dtype} on {p.device}: its state is sharded, make a new engine"
                )
            home.copy_(p)
            p.data = home
            torch.autograd.graph.increment_version(self.parts[p].mine)

    @torch.no_grad()
    def spread(self, sent: bool) -> None:
        """After a step, which has written all ranks' weights or not: ends when all have all new ones."""
        if not sent:
            for piece in self._pieces:
                own = piece[self._rank].clone()
                if self.comm is not None:
                    self.comm.all_gather(piece, own)
                else:
                    gather_tensor(piece.view(-1), own)
        elif self.reach:
            self.comm.all_reduce_(torch.zeros(1, device=self._device))

    @torch.no_grad()
    def move_out(self) -> None:
        """Gives each parameter memory of its own again."""
        for p, (_, mine, begin, end) in self.parts.items():
            p.data = p.data.clone()
            mine.data = p.data.as_strided((end - begin,), (1,), p.storage_offset() + begin)
        self._pieces, self._homes = [], {}

    def statistics(self, grads: list[Tensor | None]) -> Tensor:
        """fp64 [2]: sum of squares and number of blocks that are not finite, of all ranks' gradients."""
        own = [grad for grad in grads if grad is not None]
        return self.sum_(ops.select(ops.forced(), self._device, torch.float32).statistics(own))

    # What the optimizer asks.

    def sinks(self, part: Tensor) -> tuple[int, ...]:
        return self._sinks.get(part, ())

    def extent(self, part: Tensor) -> tuple[int, int]:
        known = self._by_mine[part]
        return known.begin, known.whole.numel()

    def sum_(self, t: Tensor) -> Tensor:
        if self.comm is not None:
            self.comm.all_reduce_(t)
        else:
            dist.all_reduce(t)
        return t


def _of_its_own(flat: Tensor) -> Tensor:
    """The same memory as a storage of its own: who saves a parameter does not save those that lie beside it."""
    if flat.device.type != "cpu" or not flat.numel():
        return flat
    place = (ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())
    place.owner = flat  # type: ignore[attr-defined]  # kept alive with it
    return torch.frombuffer(place, dtype=flat.dtype)
