"""Collectives over the peers' memory: GPUs on one host."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast.comm.values import FLOATS, check_measured, check_pair, check_summed, nothing, tell
from deepfast.comm.watch import Watch
from deepfast.errors import PeerTimeout

STAGE = 32 << 20  # bytes: what does not lie in peer memory goes through as much of it, piece by piece

Allocate = Callable[[int], tuple[Tensor, list[int], object]]
"""Bytes -> memory of this rank (uint8), its address on every rank as this one sees it, and what keeps it mapped. All
ranks call it together."""


def symmetric_memory(group: dist.ProcessGroup, device: torch.device) -> Allocate:
    """Memory of each rank's GPU, mapped by all: torch's symmetric memory."""
    import torch.distributed._symmetric_memory as symmetric

    def allocate(nbytes: int) -> tuple[Tensor, list[int], object]:
        own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(own, group)
        return own, list(handle.buffer_ptrs), handle

    return allocate


class Segment(NamedTuple):
    """A piece of peer memory, the same on all ranks. ``place`` numbers its first byte; all ranks have the same."""

    own: Tensor
    pointers: list[int]
    place: int
    mapping: object


class OnPeers:
    """Kernels over peer memory, on the current stream; no call waits for the device.

    What goes wrong on the device (a peer that died, ranks that do different things) is raised by the next call; the
    statistics of the operation that failed say "not finite", so a step that asks them is skipped.

    Args:
        rank, ranks: this one, and those of this host; as the whole group calls them.
        patience: how much longer than ``timeout`` an all-gather waits, in seconds.
        place: held until the communicator is closed or goes.
    """

    def __init__(self, rank: int, ranks: list[int], device: torch.device, backend: Any, allocate: Allocate, peers: Any,
                 timeout: float, patience: float = 0.0, place: object = None) -> None:  # fmt: skip
        self._place = place
        self._rank, self._size, self._device = ranks.index(rank), len(ranks), device
        self._backend, self._allocate, self._peers = backend, allocate, peers
        self._segments: list[Segment] = []
        self._starts: list[int] = []  # of the segments, in order, and which one begins there
        self._at: list[int] = []
        _, nbytes, self._one_shot, _ = backend.peer_layout()
        shared, self._shared, self._shared_mapping = allocate(nbytes)
        self._own_shared = shared.zero_()
        status = torch.zeros(Watch.MISSING + 8, dtype=torch.int32)
        self._status = status.pin_memory() if device.type == "cuda" else status
        self._watch = Watch(self._status, ranks, peers.gone, timeout, patience)
        self._stage: Tensor | None = None
        self._stream: Any = None
        self._closed = False
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Peer memory, of all ranks together; it stays until the communicator goes."""
        nbytes = -(-max(1, numel * dtype.itemsize) // 4096) * 4096
        own, pointers, mapping = self._allocate(nbytes)
        place = self._segments[-1].place + self._segments[-1].own.numel() if self._segments else 0
        self._segments.append(Segment(own, pointers, place, mapping))
        where = bisect.bisect(self._starts, own.data_ptr())
        self._starts.insert(where, own.data_ptr())
        self._at.insert(where, len(self._segments) - 1)
        return own[: numel * dtype.itemsize].view(dtype)

    def addresses(self, t: Tensor) -> list[int]:
        """Where this process sees each rank's ``t``, which is the same part of peer memory on all."""
        seen = self._peer_view(t)
        if seen is None:
            raise RuntimeError("deepfast: a tensor lies in no peer memory: take it from empty()")
        return seen[0]

    def all_reduce_(self, t: Tensor, factor: float, statistics: Tensor | None, found_inf: Tensor | None) -> None:
        check_summed(t, factor)
        if t.numel() == 0:
            nothing(statistics)
            return
        data = t.contiguous()
        peer = self._peer_view(data)
        if data.nbytes <= self._one_shot or peer is not None:
            small = data.nbytes <= self._one_shot
            self._run("all_reduce", data, data, None if small else peer, factor, statistics, found_inf)
        else:
            flat = data.view(-1)
            for begin, end, stage in self._pieces(flat.numel(), flat.dtype, 1):
                stage.copy_(flat[begin:end])
                self._run("all_reduce", stage, stage, self._peer_view(stage), factor, None, found_inf)
                flat[begin:end] = stage[0]
            self._measure(data, statistics)
        if data is not t:
            t.copy_(data)

    def reduce_scatter(self, out: Tensor, t: Tensor, factor: float, statistics: Tensor | None,
                       found_inf: Tensor | None) -> None:  # fmt: skip
        check_summed(t, factor)
        check_pair(t, out, self._size, "reduce_scatter")
        if out.numel() == 0:
            nothing(statistics)
            return
        data = out.contiguous()
        peer = self._peer_view(t)
        if peer is not None:
            self._run("reduce_scatter", t, data, peer, factor, statistics, found_inf)
        else:
            flat = data.view(-1)
            whole = t.contiguous().view(self._size, flat.numel())
            for begin, end, stage in self._pieces(flat.numel(), t.dtype, self._size):
                stage.copy_(whole[:, begin:end])
                self._run("reduce_scatter", stage, flat[begin:end], self._peer_view(stage), factor, None, found_inf)
            self._measure(data, statistics)
        if data is not out:
            out.copy_(data)

    def all_gather(self, out: Tensor, t: Tensor) -> None:
        check_summed(t, 1.0)
        check_pair(out, t, self._size, "all_gather")
        peer = self._peer_view(t)
        if peer is not None and out.is_contiguous():
            self._run("all_gather", t, out, peer, 1.0, None, None)
            return
        if t.numel() == 0:
            return
        flat, whole = t.contiguous().view(-1), out.contiguous()
        rows = whole.view(self._size, flat.numel())
        for begin, end, stage in self._pieces(flat.numel(), flat.dtype, 1):
            stage.copy_(flat[begin:end])
            gathered = torch.empty(self._size, end - begin, dtype=out.dtype, device=out.device)
            self._run("all_gather", stage, gathered, self._peer_view(stage), 1.0, None, None)
            rows[:, begin:end] = gathered
        if whole is not out:
            out.copy_(whole)

    def close(self) -> None:
        if self._closed:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what still runs must not miss this rank, nor its watch
        self._closed = True
        self._watch.found.set()
        self._place = None

    def check(self) -> None:
        """Raises what has gone wrong so far."""
        self._raise_what_went_wrong()

    def _peer_view(self, t: Tensor) -> tuple[list[int], int] | None:
        """Each rank's address of ``t``, and its place; None where it lies in other memory, or not in one run."""
        if not t.is_contiguous():
            return None
        at = bisect.bisect(self._starts, t.data_ptr()) - 1
        if at < 0:
            return None
        segment = self._segments[self._at[at]]
        offset = t.data_ptr() - segment.own.data_ptr()
        if offset + t.nbytes > segment.own.numel():
            return None
        return [pointer + offset for pointer in segment.pointers], segment.place + offset

    def _pieces(self, numel: int, dtype: torch.dtype, rows: int) -> Any:
        """Begin, end and staging memory [rows, end - begin] of each piece. (The one before is no longer read: kernels
        end when all ranks have.)"""
        if self._stage is None:
            self._stage = self.empty(STAGE, torch.uint8)
        step = STAGE // rows // dtype.itemsize // 4096 * 4096
        for begin in range(0, numel, step):
            n = min(step, numel - begin)
            yield begin, begin + n, self._stage[: rows * n * dtype.itemsize].view(dtype).view(rows, n)

    def _measure(self, t: Tensor, statistics: Tensor | None) -> None:
        if statistics is not None:
            tell(t, self.failed(), statistics, None)

    def failed(self) -> Tensor:
        """int32 [1], on the device: not 0 where an operation so far has failed. Asked without a wait."""
        status = self._status[: Watch.MISSING].to(self._device, non_blocking=True)
        return status[Watch.GIVE_UP] | status[Watch.DISAGREE]

    def _run(self, kind: str, t: Tensor, out: Tensor, peer: tuple[list[int], int] | None, factor: float,
             statistics: Tensor | None, found_inf: Tensor | None) -> None:  # fmt: skip
        self._raise_what_went_wrong()
        kernels = out.dtype in FLOATS
        if statistics is not None:
            check_measured(out)
        if self._device.type == "cuda":  # one operation after the other, whatever the stream
            stream = torch.cuda.current_stream(self._device)
            if self._stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():
                stream.wait_stream(self._stream)
            self._stream = stream
        data, place = peer or ([], -1)
        self._backend.collective_(kind, t, out, self._shared, data, place, self._rank, factor, statistics,
                                  found_inf if kernels else None, self._status)  # fmt: skip
        if found_inf is not None and out.dtype == torch.float64:
            tell(out, self.failed(), None, found_inf)

    def _raise_what_went_wrong(self) -> None:
        if self._closed:
            raise RuntimeError("deepfast: the communicator is closed")
        if self._status[Watch.DISAGREE]:
            raise RuntimeError(
                "deepfast: the ranks do not do the same, or their tensors do not lie at the same place of peer memory; "
                "the communicator is broken, make a new one"
            )
        if self._status[Watch.GIVE_UP]:
            self._watch.found.wait(2.0)
            ranks = tuple(self._watch.missing)
            self._peers.report(self._watch.why, list(ranks))
            raise PeerTimeout(
                f"deepfast: missing rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {self._watch.why}; the "
                "communicator is broken, make a new one",
                ranks,
            )
