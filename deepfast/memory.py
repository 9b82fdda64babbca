"""Memory for optimizer state: one allocation, in huge pages where the system gives them.

A step streams through gigabytes once; with 4 KiB pages it spends a good part of its time on address translation
(in-place streaming: 53 GB/s against 89 with 2 MiB pages on the machine this was first measured on).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HUGE = 2 << 20
_ALIGN = 64  # bytes: a cache line, and the widest vector


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed 1-D tensor; from 2 MiB on, on a CPU, in huge pages where the system allows."""
    size = numel * dtype.itemsize
    if device.type != "cpu" or size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    # Private: shared anonymous memory is shmem, which has huge pages on few systems. Untouched pages are zero.
    pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _HUGE
    return torch.frombuffer(pages, dtype=dtype, count=numel, offset=start)  # keeps `pages` alive


def zeros_like_each(
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    empty: Callable[[int, torch.dtype], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One zeroed allocation (1-D), and a view of it for each of ``tensors``, of its shape.

    Each view has its model's strides where that is dense in memory (so the two can be walked side by side), else
    contiguous ones. The memory comes from ``empty(numel, dtype)``, if that is given.
    """
    step = _ALIGN // dtype.itemsize
    offsets, total = [], 0
    for t in tensors:
        offsets.append(total)
        total += -(-t.numel() // step) * step
    flat = zeros(total, dtype, device) if empty is None else empty(total, dtype).zero_()
    return flat, [
        flat[offset : offset + t.numel()].as_strided(t.shape, _strides(t))
        for t, offset in zip(tensors, offsets, strict=True)
    ]


def _strides(t: Tensor) -> tuple[int, ...]:
    like = torch.empty_like(t, device="meta")  # keeps the strides exactly where they are dense
    return like.stride() if like.stride() == t.stride() else like.contiguous().stride()
