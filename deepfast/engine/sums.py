"""Gradient accumulation: micro-batches, and ranks, summed in fp32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import ops
from deepfast.engine.buckets import Buckets
from deepfast.engine.layout import Layout
from deepfast.optim import memory


class Sums:
    """What the micro-batches of one step, and all ranks, have in common: who has a gradient, and the total weight."""

    params: list[Tensor]
    comm: Any
    ranks: int
    device: torch.device

    def clear(self) -> None:
        """Forgets this step's gradients."""
        self.present = [False] * len(self.params)
        self.weight = 0.0
        self.weighted: bool | None = None  # whether this step's micro-batches came with a weight

    def expect(self, weight: float | None, times: float) -> None:
        """A pass begins that nobody has asked this engine for; what it leaves is added when the engine hears of it."""

    def _weigh(self, weight: float | None, times: float) -> float:
        """What the gradients of a micro-batch that begins are multiplied by."""
        if self.weighted is not None and self.weighted != (weight is not None):
            raise RuntimeError("backward(): give every micro-batch of a step a weight, or none")
        self.weighted = weight is not None
        return times if weight is None else weight

    def _agree(self) -> None:
        """The ranks tell each other which parameters had a gradient, and the weights of their micro-batches."""
        tail = torch.tensor([*map(float, self.present), self.weight, float(bool(self.weighted))]).to(self.device)
        if self.comm is None:
            dist.all_reduce(tail)
        else:
            self.comm.all_reduce_(tail)
        *ranks_with_gradient, self.weight, ranks_with_weight = tail.tolist()
        if self.comm is not None:
            self.comm.check()  # on a GPU: this sum has ended, and may have failed
        if ranks_with_weight not in (0.0, float(self.ranks)):
            raise RuntimeError("backward(): give the micro-batches of every rank a weight, or of none")
        self.present = [ranks > 0 for ranks in ranks_with_gradient]

    def divisor(self, micro_batches: int) -> float:
        """What the sums are to be divided by: the total weight, or the number of micro-batches."""
        if not self.weighted:
            return float(micro_batches)
        if not 0.0 < self.weight < math.inf:
            raise RuntimeError(f"backward(): the weights of this step add up to {self.weight}")
        return self.weight


def gradient_of(p: Tensor) -> Tensor | None:
    """A parameter's gradient, rounded to its type, as autograd does until the parameter has taken a sum of fp32."""
    grad, dtype = p.grad, p.grad_dtype or p.dtype
    return grad if grad is None or grad.dtype == dtype else grad.to(dtype)


def late(p: Tensor) -> RuntimeError:
    return RuntimeError(
        f"backward(): the gradient of a parameter of shape {tuple(p.shape)} came twice, the second time after it was "
        "reduced: use checkpointing with use_reentrant=False"
    )


class GradientSums(Sums):
    """Micro-batches summed in fp32, whatever the gradients' type, and over the ranks bucket by bucket.

    One flat buffer: the sums of all parameters, in the order of the buckets. A bucket is reduced, and its statistics
    taken, as soon as its last gradient is there. After the last bucket the ranks tell each other which parameters had a
    gradient and what the total weight is: a parameter that no rank used stays without a gradient everywhere.

    Args:
        params: on one device.
        comm: a :class:`deepfast.comm.Communicator`, whose memory the buffer then lies in; None: torch.distributed, if
            there are ranks.
    """

    def __init__(self, params: list[Tensor], comm: Any = None) -> None:
        self.params = params
        self.comm = comm
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device = params[0].device
        self.buckets = Buckets(params, (25 if device.type == "cuda" else 4) << 20, self._reduce)
        self._layouts = [Layout.of([params[i] for i in members], 1) for members in self.buckets.members]
        lengths = [layout.chunk for layout in self._layouts]
        place = memory.PLACE_OF_SUMS // torch.float32.itemsize
        self.flat = self._zeros(place + sum(lengths), torch.float32)[place:]
        self._pieces = list(self.flat.split(lengths))
        self.sums: list[Any] = [None] * len(params)
        for members, layout, piece in zip(self.buckets.members, self._layouts, self._pieces, strict=True):
            for i, offset in zip(members, layout.offsets, strict=True):
                self.sums[i] = memory.view_like(piece[offset : offset + params[i].numel()], params[i])
        self._found = torch.zeros(len(lengths), 2, dtype=torch.float64, device=device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.clear()

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self.comm is None:
            return memory.zeros(numel, dtype, self.device)
        return self.comm.empty(numel, dtype, self.device).zero_()

    def clear(self) -> None:
        super().clear()
        self._adding = 0.0
        self._begun = False  # whether buckets of this step have been handed over
        self._reduced = False

    def begin(self, weight: float | None, last: bool, sync: bool = True, times: float = 1.0) -> None:
        """Before a micro-batch's backward pass. last: its buckets may be reduced as they fill."""
        adding = self._weigh(weight, times)
        if self._begun:
            self._reopen()
        self._adding = adding
        if last:
            self.buckets.watch()
            self._begun = True

    def add(self) -> None:
        """After it: adds weight times each parameter's gradient, and releases the gradients."""
        if self._begun:
            self.buckets.settle()
            again = [i for b in range(self.buckets.next) for i in self.buckets.members[b] if self._has_grad(i)]
            if again and self.ranks > 1:
                raise late(self.params[again[0]])
        self._take(range(len(self.params)))
        self.weight += self._adding

    def _has_grad(self, i: int) -> bool:
        return self.params[i].grad is not None

    def _take(self, wanted: Any) -> None:
        used = [i for i in wanted if self._has_grad(i)]
        self._accumulate([i for i in used if not self.present[i]], overwrite=True)
        self._accumulate([i for i in used if self.present[i]], overwrite=False)
        for i in used:
            self.present[i] = True
            self.params[i].grad = None

    def _accumulate(self, chosen: list[int], overwrite: bool) -> None:
        if not chosen:
            return
        grads = [grad for i in chosen if (grad := gradient_of(self.params[i])) is not None]
        backend = ops.select(ops.forced(), self.flat.device, *(g.dtype for g in grads))
        backend.accumulate_([self.sums[i] for i in chosen], grads, self._adding, overwrite)

    def _reduce(self, bucket: int) -> None:
        """A bucket whose gradients are all there: adds them, and sums over the ranks."""
        members = self.buckets.members[bucket]
        self._take(members)
        for i in members:
            if not self.present[i]:
                self.sums[i].zero_()
        piece, found = self._pieces[bucket], self._found[bucket]
        if self._side is not None:  # beside the backward pass
            self._side.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(self._side):
            if self.comm is not None:
                self.comm.all_reduce_(piece, statistics=found)
                return
            if self.ranks > 1:
                dist.all_reduce(piece)
            found.copy_(ops.select(ops.forced(), piece.device, piece.dtype).statistics([piece]))

    def finish(self) -> Tensor:
        """Before the step: what is left is reduced. Returns the statistics, fp64 [2], over all parameters and ranks."""
        if not self._begun:
            self.buckets.watch()
            self._begun = True
        self.buckets.flush()
        if self._side is not None:
            torch.cuda.current_stream(self.flat.device).wait_stream(self._side)
        if self.ranks > 1 and not self._reduced:
            self._agree()
        self._reduced = True
        return self._found.sum(0)

    def _reopen(self) -> None:
        """One more backward pass, after buckets have been reduced: what is summed is the first rank's from here on."""
        if self.ranks > 1:
            self.finish()
            if dist.get_rank() != 0:
                self.present, self.weight = [False] * len(self.params), 0.0
        self._begun = self._reduced = False

    def hand_over(self) -> None:
        """Makes the sums the parameters' gradients; a parameter that was not used gets none."""
        for p, total, present in zip(self.params, self.sums, self.present, strict=True):
            p.grad_dtype = None  # an fp32 gradient for a 16-bit parameter
            p.grad = total if present else None
