"""Sharded sums of gradients where ranks do not see each other's memory: scattered by NCCL, gloo or collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import ops
from deepfast.comm.by_torch import scatter_tensor
from deepfast.engine.buckets import Buckets
from deepfast.engine.layout import BLOCK, Layout
from deepfast.engine.sums import Sums, gradient_of, late
from deepfast.optim import memory
from deepfast.optim.state import HALF

_SMALL_BLOCK = 256  # elements: where ranks are many, whole blocks of the statistics would leave most of them nothing


class ScatteredSums(Sums):
    """Gradients summed in fp32; each rank is left with the sum of its part of every bucket.

    Stage 1 adds micro-batches up on each rank, in 4 bytes a parameter, and scatters once a step. Stage 2 scatters those
    of each micro-batch, one bucket at a time, and keeps 4 / ranks bytes; ``no_sync`` saves it nothing.

    Args:
        params: on one device.
        comm: a communicator, or None: torch.distributed.
        stage: 1 or 2.
    """

    def __init__(self, params: list[Tensor], comm: Any, stage: int) -> None:
        self.params: list[Tensor] = []
        self.comm, self._each = comm, stage == 2
        self.ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self.device = params[0].device
        self.buckets = Buckets([], (25 if self.device.type == "cuda" else 4) << 20, self._take)
        self.layouts: list[Layout] = []
        self._whole: list[Tensor] = []  # stage 1: of each bucket [ranks, chunk]; stage 2: of the bucket at work
        self._owned: list[Tensor] = []  # of each bucket [chunk]
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.add_params(params)

    def add_params(self, params: list[Tensor]) -> None:
        """More of them, between two steps."""
        first = len(self.buckets.members)
        self.buckets.add(params)
        self.params = self.buckets.params
        block = BLOCK if self.ranks <= 64 else _SMALL_BLOCK
        for members in self.buckets.members[first:]:
            layout = Layout.of([self.params[i] for i in members], self.ranks, block)
            self.layouts.append(layout)
            self._owned.append(memory.zeros(layout.chunk, torch.float32, self.device, memory.PLACE_OF_SUMS))
            if not self._each:
                self._whole.append(self._zeros(layout.chunk * self.ranks))
        if self._each:
            self._whole = [self._zeros(max(layout.chunk for layout in self.layouts) * self.ranks)]
        self.clear()

    def _zeros(self, numel: int) -> Tensor:
        if self.comm is None:
            return memory.zeros(numel, torch.float32, self.device)
        return self.comm.empty(numel, torch.float32, self.device).zero_()

    def clear(self) -> None:
        super().clear()
        self._empty = [True] * len(self.layouts)  # whether a bucket has nothing of this step yet
        self._adding, self._last, self._agreed = 1.0, False, False

    def begin(self, weight: float | None, last: bool, sync: bool = True, times: float = 1.0) -> None:
        """Before a micro-batch's backward pass."""
        self._adding = self._weigh(weight, times)
        self._last, self._agreed = last, False
        self.buckets.watch()

    def add(self) -> None:
        """After it: what backward has not handed over is."""
        self.buckets.flush()
        again = next((p for p in self.params if p.grad is not None), None)
        if again is not None:
            raise late(again)
        self.weight += self._adding

    def _take(self, bucket: int) -> None:
        """A bucket whose gradients are all there."""
        members, layout = self.buckets.members[bucket], self.layouts[bucket]
        numel = layout.chunk * self.ranks
        if self._narrow(members):
            whole = self._whole[0].view(self.params[members[0]].dtype)[:numel]
        else:
            whole = self._whole[0 if self._each else bucket][:numel]
        fresh = self._each or self._empty[bucket]
        params = [self.params[i] for i in members]
        places = [whole[at : at + p.numel()] for at, p in zip(layout.offsets, params, strict=True)]
        if fresh:
            if self._side is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._side)  # the bucket before has gone
            unused = [place for place, p in zip(places, params, strict=True) if p.grad is None]
            for place in (*unused, *(whole[begin:end] for begin, end in layout.gaps(params, numel))):
                place.zero_()
        given = [(memory.view_like(place, p), gradient_of(p)) for place, p in zip(places, params, strict=True)]
        views, grads = [v for v, g in given if g is not None], [g for _, g in given if g is not None]
        if grads and whole.dtype != torch.float32:
            torch._foreach_copy_(views, grads)
        elif grads:
            backend = ops.select(ops.forced(), self.device, *{g.dtype for g in grads})
            backend.accumulate_(views, grads, self._adding, fresh)
        for i, p in zip(members, params, strict=True):
            self.present[i] |= p.grad is not None
            p.grad = None
        if self._each:
            self._scatter(bucket, whole, add=not self._empty[bucket])
        elif self._last:
            self._scatter(bucket, whole, add=False)
        self._empty[bucket] = False

    def _narrow(self, members: list[int]) -> bool:
        """Whether a micro-batch's gradients go to the others in 16 bits, as they are: these add them up in fp32."""
        if not self._each or self.comm is None or self.weighted or self._adding != 1.0:
            return False
        dtype = self.params[members[0]].dtype
        grads = [gradient_of(self.params[i]) for i in members]
        return dtype in HALF and all(grad is None or grad.dtype == dtype for grad in grads)

    def _scatter(self, bucket: int, whole: Tensor, add: bool) -> None:
        owned = self._owned[bucket]
        out = torch.empty_like(owned) if add else owned
        if self._side is not None:  # beside the backward pass
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            out.record_stream(self._side)
        with torch.cuda.stream(self._side):
            if self.comm is not None:
                self.comm.reduce_scatter(out, whole.view(self.ranks, -1))
            else:
                scatter_tensor(out, whole)
            if add:
                owned.add_(out)

    def finish(self) -> Tensor:
        """Before the step. Returns the statistics, fp64 [2], over all parameters and ranks."""
        if not self._last:
            self._last, self._adding = True, 0.0
            self.buckets.watch()
        self.buckets.flush()
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        if not self._agreed:
            self._agree()
        self._agreed = True
        found = ops.select(ops.forced(), self.device, torch.float32).statistics(self._owned)
        if self.comm is not None:
            return self.comm.all_reduce_(found)
        dist.all_reduce(found)
        return found

    def hand_over(self, to: list[Tensor]) -> None:
        """Makes the sums the gradients of ``to``, this rank's parts of the parameters; what was not used gets none."""
        for members, layout, owned in zip(self.buckets.members, self.layouts, self._owned, strict=True):
            start, _ = layout.owned(self._rank)
            for nth, i in enumerate(members):
                begin, end = layout.part(nth, self.params[i], self._rank)
                at = max(layout.offsets[nth] + begin - start, 0)
                to[i].grad_dtype = None
                to[i].grad = owned[at:][: end - begin] if self.present[i] else None
