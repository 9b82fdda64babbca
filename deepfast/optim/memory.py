"""Memory for optimizer state and sums, in huge pages where the system gives them.

A step streams through gigabytes once; with 4 KiB pages it spends a good part of its time on address translation
(in-place streaming: 53 GB/s against 89 with 2 MiB pages on the machine this was first measured on).

State tensors have memory of their own: who saves, copies or drops one of them has to do with that one alone. Only the
smallest share blocks. (Against one allocation for all, steps of one tensor of 64M elements, of GPT-2's 148 and of 2000
of 256 take the same time; without blocks the last take 1.4 times as long: each tensor brings a storage object along.)

Where in its page a stream begins matters, too: if all that a step walks side by side began at the same place in one,
they would fall into the same sets of the caches and the same banks of the memory, and loads would wait for stores that
only look as if they were to the same address (AdamW on two Zen cores: 99 ms, against 72 with each a little later than
the one before). Of what shares a block it matters little (up to 1.02 times as long), and so that may begin anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_HUGE = 2 << 20
_PAGE = 4 << 10
_BLOCK = 16 << 10
_ALIGN = 64  # bytes: a cache line, and the widest vector
_STAGGER = 17 * _ALIGN  # how much later in its page the next stream begins
_GAP = 4 * _ALIGN  # what is at least between two

# Neither where torch's allocator places a large tensor (64) nor where a huge page begins.
PLACE_OF_SUMS = 2 * _STAGGER


def zeros(numel: int, dtype: torch.dtype, device: torch.device, place: int | None = None) -> Tensor:
    """A zeroed 1-D tensor; from 2 MiB on, on a CPU, in huge pages where the system allows.

    What fills no huge page is in ordinary ones: a tensor takes no more than its size, and at most a page to begin at
    its place.

    Args:
        place: on a CPU, the number of bytes after the start of a page at which it begins. (Not where a process has all
            the mappings that it may have.)
    """
    size = numel * dtype.itemsize
    huge = size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    if device.type != "cpu" or not size or (place is None and not huge):
        return torch.zeros(numel, dtype=dtype, device=device)
    place = place or 0
    if not huge:
        buffer = bytearray(size + _PAGE)
        return torch.frombuffer(buffer, dtype=dtype, count=numel, offset=(place - _address(buffer)) % _PAGE)
    # Private: shared anonymous memory is shmem, which has huge pages on few systems. Untouched pages are zero.
    try:
        pages = mmap.mmap(-1, _HUGE + place + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a process has so many mappings and no more
        return torch.zeros(numel, dtype=dtype, device=device)
    start = -_address(pages) % _HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        pages.madvise(mmap.MADV_HUGEPAGE, start, (place + size) // _HUGE * _HUGE)
    return torch.frombuffer(pages, dtype=dtype, count=numel, offset=start + place)  # keeps `pages` alive


def _address(buffer: bytearray | mmap.mmap) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


def _place_beside(streams: Sequence[Tensor]) -> int | None:
    """Where in its page a stream may begin that is walked side by side with ``streams``; None: anywhere."""
    if not streams:
        return None
    taken = [t.data_ptr() % _PAGE for t in streams]
    first = taken[0] // _ALIGN * _ALIGN
    places = ((first + nth * _STAGGER) % _PAGE for nth in range(1, _PAGE // _ALIGN))
    free = (place for place in places if all(_GAP <= (place - t) % _PAGE <= _PAGE - _GAP for t in taken))
    return next(free, None)


def zeros_like_each(
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    beside: Callable[[int], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """A zeroed tensor for each of ``tensors``, of its shape and, as in :func:`flat_like`, its strides.

    Those up to 16 KiB share blocks of that size.

    Args:
        beside: of the nth, what it will be walked side by side with (on a CPU; else nothing): a larger one begins
            elsewhere in its page.
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
        large = tensors[block[0]].numel() * dtype.itemsize > _BLOCK
        place = _place_beside(beside(block[0])) if beside and large else None
        new = functools.partial(zeros, device=device, place=place)
        made.update(zip(block, flat_like([tensors[i] for i in block], dtype, new)[1], strict=True))
    return [made[i] for i in range(len(tensors))]


def flat_like(
    tensors: Sequence[Tensor], dtype: torch.dtype, new: Callable[[int, torch.dtype], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One zeroed allocation (1-D), and a view of it for each of ``tensors``, as :func:`view_like` gives it.

    Args:
        new: ``new(numel, dtype)`` gives the memory, zeroed.
    """
    step = _ALIGN // dtype.itemsize
    offsets, total = [], 0
    for t in tensors:
        offsets.append(total)
        total += -(-t.numel() // step) * step
    flat = new(total, dtype)
    return flat, [view_like(flat[at : at + t.numel()], t) for t, at in zip(tensors, offsets, strict=True)]


def view_like(flat: Tensor, model: Tensor) -> Tensor:
    """``flat``, which has as many elements, in the model's shape.

    With its strides where those are dense in memory (so the two can be walked side by side), else contiguous.
    """
    return flat.as_strided(model.shape, strides_of(model))


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
    strides = strides_of(model)
    if t.stride() == strides or t.untyped_storage().nbytes() > max(t.nbytes + _ALIGN, _BLOCK):
        return t
    return zeros_like_each([model], t.dtype, t.device)[0].copy_(t)


def strides_of(t: Tensor) -> tuple[int, ...]:
    """Those of ``t`` where they are dense in memory, else contiguous ones."""
    if t.is_contiguous():  # mostly, and a hundredth of the time
        return t.stride()
    like = torch.empty_like(t, device="meta")  # keeps the strides exactly where they are dense
    return like.stride() if like.stride() == t.stride() else like.contiguous().stride()
