"""Gradients in buckets: what can be done with a bucket is done while backward still computes the others."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from deepfast import ops
from deepfast.optim.shards import is_sharded


class Buckets:
    """Parameters, the last first (about the order in which their gradients come), in buckets of about ``size`` bytes.

    After :meth:`watch`, ``ready(bucket)`` is called for each bucket once all its parameters have a gradient, in the
    order of the buckets, which is the same on all ranks. It is called when the next gradient comes: by then all hooks
    of the bucket's own parameters have run.

    Attributes:
        members: for each bucket the indices of its parameters.
        next: how many buckets ``ready`` has been called for since :meth:`watch`.
    """

    def __init__(self, params: list[Tensor], size: int, ready: Callable[[int], None]) -> None:
        self.params, self._ready = params, ready
        self.members: list[list[int]] = []
        room = 0
        for i in reversed(range(len(params))):
            numel = params[i].numel()
            if not self.members or numel > room:
                self.members.append([])
                room = size // 4
            self.members[-1].append(i)
            room -= numel
        self._bucket = {i: b for b, members in enumerate(self.members) for i in members}
        self._hooked: set[int] = set()
        self._watching = False
        self._waits_for = [0] * len(self.members)
        self.next = len(self.members)

    def watch(self) -> None:
        """The backward pass that comes is the last before the step."""
        own = weakref.ref(self)
        for i, p in enumerate(self.params):
            if i not in self._hooked and p.requires_grad:  # one that was frozen may come later
                p.register_post_accumulate_grad_hook(functools.partial(_arrived, own, i))
                self._hooked.add(i)
        self._waits_for = [len(members) for members in self.members]
        self._watching, self.next = True, 0

    def settle(self) -> None:
        """The backward pass has ended: hands over what it has filled."""
        self._watching = False
        while self.next < len(self.members) and self._waits_for[self.next] <= 0:
            self.next += 1
            self._ready(self.next - 1)

    def flush(self) -> None:
        """Hands over the buckets that are left, full or not."""
        self._waits_for = [0] * len(self.members)
        self.settle()

    def _arrive(self, i: int) -> None:
        if self._watching:
            self.settle()
            self._watching = True
            self._waits_for[self._bucket[i]] -= 1


def _arrived(buckets: weakref.ref[Buckets], i: int, _: Tensor) -> None:
    alive = buckets()
    if alive is not None:
        alive._arrive(i)


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
