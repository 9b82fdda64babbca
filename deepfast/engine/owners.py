"""Ranks that share a host's memory: each sums a part of every bucket for all, while backward computes the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import ops
from deepfast.engine.buckets import Buckets
from deepfast.engine.layout import Layout
from deepfast.engine.sums import Sums, gradient_of, late
from deepfast.optim import memory

BUCKET = 4 << 20  # bytes, in fp32


class OwnedSums(Sums):
    """Micro-batches summed in fp32 by the ranks that own them; the gradients are given up as soon as they are read.

    The order is that of one process which has all the micro-batches: whatever the number of ranks, and whether the
    owners keep their part (``sharded``) or show it to all, the sums have the same bits.

    Inside ``no_sync`` a rank sums alone, in memory of its own for all gradients; that sum counts as one micro-batch.

    Args:
        params: real ones, on the CPU.
        comm: a communicator whose ranks are all on this host.
        sharded: no rank gets to see the sums that another owns: 4 / ranks bytes a parameter instead of 4.
    """

    def __init__(self, params: list[Tensor], comm: Any, sharded: bool) -> None:
        self.params: list[Tensor] = []
        self.comm, self.sharded = comm, sharded
        self.ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self.device = torch.device("cpu")
        self.buckets = Buckets([], BUCKET, self._sum)
        self.layouts: list[Layout] = []
        self.sums: list[Tensor] = []  # of each bucket: what this rank owns, or all
        self._statistics: list[Tensor] = []
        self._strides: list[tuple[int, ...]] = []
        self._alone: list[Tensor] = []  # sums of this rank alone, made when they are first needed
        self.add_params(params)

    def add_params(self, params: list[Tensor]) -> None:
        """More of them, between two steps."""
        first = len(self.buckets.members)
        self.buckets.add(params)
        self.params = self.buckets.params
        self._strides.extend(map(memory.strides_of, params))
        for members in self.buckets.members[first:]:
            layout = Layout.of([self.params[i] for i in members], self.ranks)
            self.layouts.append(layout)
            self.sums.append(self._zeros(layout))
            self._statistics.append(torch.zeros(2, dtype=torch.float64))
        self._alone = []
        self.clear()

    def _zeros(self, layout: Layout) -> Tensor:
        begin, end = layout.owned(self._rank)
        if self.sharded:
            return memory.zeros(end - begin, torch.float32, self.device, memory.PLACE_OF_SUMS)
        place = memory.PLACE_OF_SUMS // torch.float32.itemsize
        return self.comm.empty(place + layout.numel, torch.float32).zero_()[place:]

    def clear(self) -> None:
        super().clear()
        self._overwrite = [True] * len(self.sums)  # whether a bucket has nothing of this step yet
        self._adding, self._last, self._sync = 1.0, False, True
        self._was_alone = False  # there are sums of this rank alone, which the others have not seen:
        self._unseen = [False] * len(self.params)  # of these parameters
        self._agreed = False

    def begin(self, weight: float | None, last: bool, sync: bool = True, times: float = 1.0) -> None:
        """Before a micro-batch's backward pass. last: the statistics are wanted. sync: not inside ``no_sync``."""
        self._adding = self._weigh(weight, times)
        self._last, self._sync, self._agreed = last, sync, False
        if sync:
            self.buckets.watch()

    def add(self) -> None:
        """After it: what backward has not handed over is."""
        if self._sync:
            self._flush()
        else:
            self._add_alone(range(len(self.params)))
            self._was_alone = True
        again = next((p for p in self.params if p.grad is not None), None)
        if again is not None:
            raise late(again)
        self.weight += self._adding

    def _flush(self) -> None:
        self.buckets.flush()
        self._was_alone = False

    def _add_alone(self, which: Any) -> None:
        self._alone = self._alone or memory.zeros_like_each(self.params, torch.float32, self.device)
        for overwrite in (True, False):
            chosen = [i for i in which if self.params[i].grad is not None and self._unseen[i] != overwrite]
            grads = [self._gradient(i) for i in chosen]
            if chosen:
                backend = ops.select(ops.forced(), self.device, *(g.dtype for g in grads if g is not None))
                backend.accumulate_([self._alone[i] for i in chosen], grads, self._adding, overwrite)
        for i in which:
            self._unseen[i] |= self.params[i].grad is not None
            self.params[i].grad = None

    def _gradient(self, i: int) -> Tensor | None:
        """A parameter's, as it is to lie in its bucket."""
        grad = gradient_of(self.params[i])
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"backward(): the gradient of a parameter of shape {tuple(grad.shape)} is {grad.layout}, which ranks "
                "cannot sum: build its layer with sparse=False"
            )
        dtype = grad.dtype if grad.dtype in ops.KERNEL_DTYPES else torch.float32
        if grad.dtype == dtype and grad.stride() == self._strides[i] and not grad.is_neg():
            return grad.detach()
        return torch.empty_strided(grad.shape, self._strides[i], dtype=dtype).copy_(grad.detach())

    def _sum(self, bucket: int) -> None:
        """A bucket whose gradients are all there: each owner adds its part of them."""
        members, layout, total = self.buckets.members[bucket], self.layouts[bucket], self.sums[bucket]
        weight, dtype = self._adding, self.params[members[0]].dtype
        if self._was_alone:
            self._add_alone(members)
            grads = [self._alone[i] if self._unseen[i] else None for i in members]
            weight, dtype = 1.0, torch.float32
        else:
            grads = [self._gradient(i) for i in members]
        everywhere = self._last and not self.sharded
        begin, end = layout.owned(self._rank)
        self.comm.add_to_owners(
            total if everywhere or self.sharded else total[begin:end],
            grads,
            layout.offsets,
            layout.numel,
            layout.chunk,
            dtype,
            weight=weight,
            overwrite=self._overwrite[bucket],
            everywhere=everywhere,
            statistics=self._statistics[bucket] if self._last else None,
        )
        self._overwrite[bucket] = False
        for i, grad in zip(members, grads, strict=True):
            self.present[i] |= grad is not None
            self._unseen[i] = False
            self.params[i].grad = None

    def finish(self) -> Tensor:
        """Before the step. Returns the statistics, fp64 [2], over all parameters and ranks."""
        if self._was_alone or not self._last:
            self._last = True
            self.buckets.watch()
        self._flush()
        if not self._agreed:
            self._agree()
        self._agreed = True
        return torch.stack(self._statistics).sum(0)

    def views(self) -> list[Tensor]:
        """Of each parameter the sum, or this rank's part of it as a 1-D tensor."""
        found: list[Any] = [None] * len(self.params)
        for members, layout, total in zip(self.buckets.members, self.layouts, self.sums, strict=True):
            start, _ = layout.owned(self._rank)
            for nth, i in enumerate(members):
                p, at = self.params[i], layout.offsets[nth]
                if self.sharded:
                    begin, end = layout.part(nth, p, self._rank)
                    found[i] = total[max(at + begin - start, 0) :][: end - begin]
                else:
                    found[i] = memory.view_like(total[at : at + p.numel()], p)
        return found

    def hand_over(self, to: list[Tensor] | None = None) -> None:
        """Makes the sums the gradients of ``to``, of the parameters themselves if None; what was not used gets none."""
        for p, total, present in zip(to or self.params, self.views(), self.present, strict=True):
            p.grad_dtype = None  # an fp32 gradient for a 16-bit parameter
            p.grad = total if present else None
