"""The statistics of gradients that nobody sums, taken while backward still computes others."""

from __future__ import annotations

import torch
from torch import Tensor

from deepfast import ops
from deepfast.engine.buckets import Buckets
from deepfast.optim.shards import is_sharded


class GradientStatistics:
    """The statistics of the parameters' own gradients, bucket by bucket while backward runs."""

    def __init__(self, params: list[Tensor], backend: str, size: int = 4 << 20) -> None:
        self._backend = backend
        self._usable = not any(map(is_sharded, params)) and len({p.device for p in params}) == 1
        self._buckets = Buckets(params, size, self._measure)
        count = len(self._buckets.members)
        self._found: list[Tensor | None] = [None] * count
        self._seen: list[list[tuple[Tensor, int]]] = [[] for _ in range(count)]

    def begin(self) -> None:
        if self._usable:
            self._buckets.watch()

    def end(self) -> None:
        self._buckets.settle()

    def _grads(self, bucket: int) -> list[Tensor]:
        params = self._buckets.params
        return [grad for i in self._buckets.members[bucket] if (grad := params[i].grad) is not None]

    def _measure(self, bucket: int) -> None:
        grads = self._grads(bucket)
        self._seen[bucket] = [(grad, grad._version) for grad in grads]
        plain = all(type(g) is Tensor and g.layout == torch.strided and not g.is_neg() for g in grads)
        if not plain:
            self._usable = False
        elif not grads:
            self._found[bucket] = None
        else:
            backend = ops.select(self._backend, grads[0].device, *{g.dtype for g in grads})
            self._found[bucket] = backend.statistics(grads)

    def take(self) -> Tensor | None:
        """fp64 [2] over all gradients, as the optimizer wants them; None where it has to look itself.

        A bucket whose gradients were written or replaced after it was filled is looked at again.
        """
        if not self._usable:
            return None
        self._buckets.flush()
        for bucket, seen in enumerate(self._seen):
            grads = self._grads(bucket)
            same = len(grads) == len(seen) and all(
                g is then and g._version == version for g, (then, version) in zip(grads, seen, strict=True)
            )
            if not same:
                self._measure(bucket)
        self._seen = [[] for _ in self._seen]
        found = [one for one in self._found if one is not None]
        return torch.stack(found).sum(0) if self._usable and found else None
