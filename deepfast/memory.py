"""Memory for optimizer state and sums, in huge pages where the system gives them.

A step streams through gigabytes once; with 4 KiB pages it spends a good part of its time on address translation
(in-place streaming: 53 GB/s against 89 with 2 MiB pages on the machine this was first measured on).

State tensors have memory of their own: who saves, copies or drops one of them has to do with that one alone. Only the
smallest share blocks. (Against one allocation for all, steps of one tensor of 64M elements, of GPT-2's 148 and of 2000
of 256 take the same time; without blocks the last take 1.4 times as long: each tensor brings a storage object along.)
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_HUGE = 2 << 20
_BLOCK = 16 << 10
_ALIGN = 64  # bytes: a cache line, and the widest vector


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed 1-D tensor; from 2 MiB on, on a CPU, in huge pages where the system allows.

    What fills no huge page is in ordinary ones: a tensor takes no more than its size.
    """
    size = numel * dtype.itemsize
    if device.type != "cpu" or size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    # Private: shared anonymous memory is shmem, which has huge pages on few systems. Untouched pages are zero.
    try:
        pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a process has so many mappings and no more
        return torch.zeros(numel, dtype=dtype, device=device)
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        pages.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE * _HUGE)
    return torch.frombuffer(pages, dtype=dtype, count=numel, offset=start)  # keeps `pages` alive


def zeros_like_each(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A zeroed tensor for each of ``tensors``, of its shape and, as in :func:`flat_like`, its strides.

    Those up to 16 KiB share blocks of that size.
    """
    blocks: list[list[int]] = []
    left = 0
    for i, t in enumerate(tensors):
        size = -(-max(t.numel(), 1) * dtype.itemsize // _ALIGN) * _ALIGN
        if size > _BLOCK:
            blocks.insert(0, [i])  # the last one stays open
        elif size > left:
            blocks.append([i])
            left = _BLOCK - size
        else:
            blocks[-1].append(i)
            left -= size
    made: dict[int, Tensor] = {}
    for block in blocks:
        made.update(zip(block, flat_like([tensors[i] for i in block], dtype, device)[1], strict=True))
    return [made[i] for i in range(len(tensors))]


def flat_like(
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


def layers(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Of tensors that share memory with others: id -> how many come before it in the same place. Mostly none do."""
    places = []
    for nth, t in enumerate(tensors):
        if t.numel() and t.device.type in ("cpu", "cuda") and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            places.append((t.data_ptr(), t.data_ptr() + extent * t.itemsize, nth, id(t)))
    found: dict[int, int] = {}
    together: list[tuple[int, int]] = []  # those whose places form one piece
    end = 0
    for begin, its_end, nth, name in (*sorted(places), (sys.maxsize, sys.maxsize, 0, 0)):
        if begin >= end:
            if len(together) > 1:
                found.update((name, layer) for layer, (_, name) in enumerate(sorted(together)))
            together = []
        together.append((nth, name))
        end = max(end, its_end)
    return found


def in_order_of(t: Tensor, model: Tensor) -> Tensor:
    """``t``, if need be laid anew so that it can be walked side by side with ``model``.

    Not where somebody else may look at its memory, too.
    """
    if t.shape != model.shape or t.stride() == model.stride() or (t.device.type == "cpu" and t.is_shared()):
        return t
    strides = _strides(model)
    if t.stride() == strides or t.untyped_storage().nbytes() > max(t.nbytes + _ALIGN, _BLOCK):
        return t
    return zeros_like_each([model], t.dtype, t.device)[0].copy_(t)


def _strides(t: Tensor) -> tuple[int, ...]:
    like = torch.empty_like(t, device="meta")  # keeps the strides exactly where they are dense
    return like.stride() if like.stride() == t.stride() else like.contiguous().stride()
