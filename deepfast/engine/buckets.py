"""Gradients in buckets: what can be done with a bucket is done while backward still computes the others."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class Buckets:
    """Parameters, the last first (about the order in which their gradients come), in buckets of about ``size`` bytes.

    Of one type each: a bucket's gradients can be moved as they are.

    After :meth:`watch`, ``ready(bucket)`` is called for each bucket once all its parameters have a gradient, in the
    order of the buckets, which is the same on all ranks. It is called when the next gradient comes: by then all hooks
    of the bucket's own parameters have run.

    Attributes:
        members: for each bucket the indices of its parameters.
        next: how many buckets ``ready`` has been called for since :meth:`watch`.
    """

    def __init__(self, params: list[Tensor], size: int, ready: Callable[[int], None]) -> None:
        self.params: list[Tensor] = []
        self._ready, self._size = ready, size
        self.members: list[list[int]] = []
        self._bucket: dict[int, int] = {}
        self._hooked: set[int] = set()
        self._watching = False
        self.add(params)

    def add(self, params: list[Tensor]) -> None:
        """More parameters, in buckets of their own. Not between :meth:`watch` and :meth:`flush`."""
        known = len(self.params)
        self.params.extend(params)
        filling: dict[torch.dtype, tuple[list[int], int]] = {}  # the bucket that is being filled, and its room
        for i in reversed(range(known, len(self.params))):
            p = self.params[i]
            bucket, room = filling.get(p.dtype, ([], -1))
            if p.numel() > room:
                bucket, room = [], self._size // 4
                self.members.append(bucket)
            bucket.append(i)
            filling[p.dtype] = bucket, room - p.numel()
        self._bucket = {i: b for b, members in enumerate(self.members) for i in members}
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
