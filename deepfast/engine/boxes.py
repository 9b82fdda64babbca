"""A range of a tensor's memory, as boxes: the form in which any other rank, or plain torch, can find its elements.

A rank's part of a parameter is a run of elements as they lie in memory. In a row-major matrix that is the end of a row,
whole rows, and the beginning of a row: three boxes; with n dimensions at most 2n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Box(NamedTuple):
    """Elements [offset, offset + size) along each dimension of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def cut(run: Tensor, like: Tensor, begin: int) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of ``like`` that a run of its memory fills, each with its elements: a view of ``run`` in its shape.

    Args:
        run: 1-D: elements ``begin`` and following of something that lies in memory as ``like`` does.
    """
    order = _order(like)
    place = [order.index(d) for d in range(like.ndim)]
    taken = 0
    for offsets, sizes in _row_major([like.shape[d] for d in order], begin, begin + run.numel()):
        numel = math.prod(sizes)
        view = run[taken : taken + numel].view(sizes).permute(place)
        yield Box(tuple(offsets[i] for i in place), tuple(view.shape)), view
        taken += numel


def run_of(t: Tensor, like: Tensor, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of ``t``, counted as those of ``like``, which has its shape, lie in memory."""
    return t.permute(_order(like)).reshape(-1)[begin:end]


def box_of(p: Any) -> tuple[Box, bool]:
    """The elements of a DTensor that this rank has; and whether no rank before it has the same."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    replicated = (d for d, placement in enumerate(p.placements) if placement.is_replicate())
    first = all(p.device_mesh.get_local_rank(d) == 0 for d in replicated)
    return Box(tuple(offsets), tuple(sizes)), first


def _order(t: Tensor) -> list[int]:
    """The dimensions of a dense tensor, the slowest first."""
    return sorted(range(t.ndim), key=lambda d: -t.stride()[d] if t.shape[d] > 1 else 0)


def _row_major(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes that elements [begin, end) fill, in their order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    rows = shape[1:]
    row = math.prod(rows)
    (first, head), (last, tail) = divmod(begin, row), divmod(end, row)
    if head:  # the end of a row that others have begun
        upto = tail if first == last else row
        yield from ((((first, *o), (1, *s))) for o, s in _row_major(rows, head, upto))
        first += 1
    if first < last:
        yield (first, *(0 for _ in rows)), (last - first, *rows)
    if tail and first <= last:
        yield from ((((last, *o), (1, *s))) for o, s in _row_major(rows, 0, tail))
