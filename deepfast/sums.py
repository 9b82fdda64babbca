"""Gradient accumulation: micro-batches, and ranks, summed in fp32."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import memory, ops


class GradientSums:
    """Micro-batches summed in fp32, whatever the gradients' type, and over the ranks in one all-reduce.

    One flat buffer: the sums of all parameters, then for each parameter whether any rank had a gradient, then the
    total weight and whether it was given. Reducing them together keeps a parameter that no rank used without a
    gradient everywhere.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        device = params[0].device
        tail = torch.empty(len(params) + 2, device="meta")
        self.flat, views = memory.zeros_like_each([*params, tail], torch.float32, device)
        self.sums, self.tail = views[:-1], views[-1]
        self.present = [False] * len(params)
        self.weight = 0.0
        self.weighted: bool | None = None  # whether this step's micro-batches came with a weight

    def add(self, weight: float | None) -> None:
        """Adds ``weight`` (None: 1) times each parameter's gradient, and releases the gradients."""
        if self.weighted is not None and self.weighted != (weight is not None):
            raise RuntimeError("backward(): give every micro-batch of a step a weight, or none")
        self.weighted = weight is not None
        weight = 1.0 if weight is None else weight
        used = [i for i, p in enumerate(self.params) if p.grad is not None]
        self._accumulate([i for i in used if not self.present[i]], weight, overwrite=True)
        self._accumulate([i for i in used if self.present[i]], weight, overwrite=False)
        for i in used:
            self.present[i] = True
            self.params[i].grad = None
        self.weight += weight

    def _accumulate(self, chosen: list[int], weight: float, overwrite: bool) -> None:
        if not chosen:
            return
        grads = [grad for i in chosen if (grad := self.params[i].grad) is not None]
        backend = ops.select(ops.forced(), self.flat.device, *(g.dtype for g in grads))
        backend.accumulate_([self.sums[i] for i in chosen], grads, weight, overwrite)

    def reduce(self) -> None:
        """Sums over all ranks."""
        for total, present in zip(self.sums, self.present, strict=True):
            if not present:
                total.zero_()
        self.tail.copy_(torch.tensor([*map(float, self.present), self.weight, float(bool(self.weighted))]))
        dist.all_reduce(self.flat)
        *ranks_with_gradient, self.weight, ranks_with_weight = self.tail.tolist()
        if ranks_with_weight not in (0.0, float(dist.get_world_size())):
            raise RuntimeError("backward(): give the micro-batches of every rank a weight, or of none")
        self.present = [ranks > 0 for ranks in ranks_with_gradient]

    def divisor(self, micro_batches: int) -> float:
        """What the sums are to be divided by: the total weight, or the number of micro-batches."""
        if not self.weighted:
            return float(micro_batches)
        if not 0.0 < self.weight < math.inf:
            raise RuntimeError(f"backward(): the weights of this step add up to {self.weight}")
        return self.weight

    def hand_over(self) -> None:
        """Makes the sums the parameters' gradients; a parameter that was not used gets none."""
        for p, total, present in zip(self.params, self.sums, self.present, strict=True):
            p.grad_dtype = None  # an fp32 gradient for a 16-bit parameter
            p.grad = total if present else None

    def clear(self) -> None:
        self.present = [False] * len(self.params)
        self.weight, self.weighted = 0.0, None
