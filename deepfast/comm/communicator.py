"""Collectives over the ranks of a process group."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, library

from deepfast.comm import across, rendezvous

Op = Literal["sum", "avg"]

_made: Counter[str] = Counter()  # communicators of each group, so that each has keys of its own in the store
_numbers = itertools.count()
_named: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()


class Communicator:
    """Sums over the ranks of ``group``: those on one host through shared memory, hosts once an operation by gloo.

    Tensors on a GPU: over the peers' memory on each host (at most 8 ranks, as many on every host); between hosts, and
    where that cannot be had, by torch.distributed. Nothing waits on the host then; what goes wrong on the device is
    raised by the next call, or by :meth:`check`. Operations of several streams follow each other as they were called,
    but in captured graphs, which must order them. A GPU holds one communicator for each 32 multiprocessors that it has
    (132: four); another one, made while so many of this process are open, goes by torch.distributed.

    All ranks of the group make it together, and call its operations in the same order; a rank that does something else
    than the others is an error on all. Sums are taken in fp32 in rank order and rounded once, so every rank gets the
    same bits. (Over several hosts each host's sum is one term.) On a CPU an operation has ended when its call
    returns. Several communicators may be used at once, from several threads.

    Args:
        group: a process group; None: all ranks. For CPU tensors only its store is used, and it may be of any backend.
        timeout: how long an operation waits for the others.

    Raises:
        PeerTimeout: from any operation. A rank that has died is noticed at once, one that is silent at the timeout.
            The communicator is broken then; make a new one with the ranks that are left.
        RuntimeError: without a process group, and where the communication cannot be compiled.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: timedelta = timedelta(minutes=10)) -> None:
        if not dist.is_initialized():
            raise RuntimeError("deepfast: no process group: call torch.distributed.init_process_group() first")
        group = dist.group.WORLD if group is None else group
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise RuntimeError("deepfast: this rank is not in the group")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"deepfast: a Communicator takes a process group, got {group!r}")
        if not isinstance(timeout, timedelta):
            raise TypeError(f"deepfast: timeout must be a datetime.timedelta, got {timeout!r}")
        if timeout.total_seconds() <= 0:
            raise ValueError(f"deepfast: timeout must be positive, got {timeout}")
        number = _made[group.group_name]
        _made[group.group_name] += 1
        store = dist.PrefixStore(f"deepfast/{number}", group.get_group_store())
        self.rank, self.size, self.timeout = group.rank(), group.size(), timeout
        # Not held: its threads would outlive destroy_process_group(), and now and then abort a Python that is ending.
        self._held_group = weakref.ref(group)
        self._peers, self._native, self._hosts = rendezvous.connect(store, self.rank, self.size, timeout)
        self._peers.heed_signals()
        self._closed = False
        self._devices: dict[torch.device, Any] = {}
        self._side: dict[torch.device, torch.cuda.Stream] = {}
        self._name = f"communicator {next(_numbers)}"
        _named[self._name] = self

    def all_reduce_(
        self,
        t: Tensor,
        op: Op = "sum",
        *,
        scale: float | None = None,
        found_inf: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Sums ``t`` over the ranks, in place; zero-copy where it lies in memory from :meth:`empty`.

        Args:
            t: any shape and layout, the same on all ranks; float32, float16, bfloat16, float64, int32 or int64.
            op: "sum" or "avg". The mean is formed before it is rounded: that of finite values is finite.
            scale: the result is multiplied by it, in the same pass.
            found_inf: one float32, set to 1 where the result is not finite, and else left alone.
            statistics: float64 [2], filled with the result's sum of squares and with how many blocks of it are not
                finite. The same bits on every rank, whatever their number.

        Returns:
            ``t``.
        """
        self._impl(t).all_reduce_(t, self._factor(op, scale), statistics, found_inf)
        return t

    def all_reduce(self, t: Tensor, op: Op = "sum", *, scale: float | None = None) -> Tensor:
        """As :meth:`all_reduce_`, in a new tensor: for autograd and torch.compile."""
        _check_tensors(t)
        return torch.ops.deepfast.all_reduce(t, self._name, self._factor(op, scale))

    def reduce_scatter(
        self,
        out: Tensor,
        t: Tensor,
        op: Op = "sum",
        *,
        scale: float | None = None,
        found_inf: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Sums ``t`` over the ranks and leaves each its part; zero-copy where ``t`` lies in memory from :meth:`empty`.

        Args:
            out: [...], this rank's part; float32 where ``t`` is 16 bits wide: the sum is not rounded then.
            t: [size, ...], rank r's part at index r.
            op, scale, found_inf, statistics: as of :meth:`all_reduce_`; the last two of this rank's part.

        Returns:
            ``out``.
        """
        _check_tensors(out, t)
        self._impl(t).reduce_scatter(out, t, self._factor(op, scale), statistics, found_inf)
        return out

    def all_gather(self, out: Tensor, t: Tensor) -> Tensor:
        """Fills ``out`` [size, ...] with each rank's ``t`` [...]; zero-copy where ``t`` lies in :meth:`empty` memory.

        ``out`` may be a float of another width: 16-bit weights from fp32 masters, say, rounded half to even.
        """
        _check_tensors(out, t)
        self._impl(t).all_gather(out, t)
        return out

    def empty(self, numel: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """Memory that the other ranks see, for operations without copies: 1-D, not initialized.

        On a CPU (the default) each rank may call it by itself, and what is freed is kept for the next call. On a GPU
        all ranks call it together, and the memory stays until the communicator goes; an operation is without copies
        where all ranks give it the same part of such memory (that some do and others do not is an error).
        """
        if not isinstance(numel, int) or not isinstance(dtype, torch.dtype):
            raise TypeError(f"deepfast: empty() takes a number of elements and a dtype, got {numel!r} and {dtype!r}")
        if numel < 0:
            raise ValueError(f"deepfast: numel must not be negative, got {numel}")
        if self._closed:
            raise RuntimeError("deepfast: the communicator is closed")
        return self._on(torch.device(device or "cpu")).empty(numel, dtype)

    def reaches(self, device: torch.device) -> bool:
        """Whether each rank can write to what the others have on ``device``. (Of a GPU all ranks ask together.)"""
        return len(self._hosts) == 1 and hasattr(self._on(device), "addresses")

    def add_to_owners(
        self,
        total: Tensor,
        grads: Sequence[Tensor | None],
        offsets: Sequence[int],
        numel: int,
        chunk: int,
        dtype: torch.dtype,
        *,
        weight: float = 1.0,
        overwrite: bool = False,
        everywhere: bool = False,
        statistics: Tensor | None = None,
    ) -> None:
        """Adds the ranks' gradients, in rank order, to the sums of those that own them; on a CPU, and one host.

        Rank r owns elements [r * chunk, (r + 1) * chunk) of a bucket. One micro-batch after the other, this is the
        order in which one process adds up the same micro-batches, dealt out in turn: any number of ranks gets the same
        bits.

        Args:
            total: float32, the owned elements; with ``everywhere`` the whole bucket, in memory from :meth:`empty`.
            grads: float32, float16 or bfloat16, dense in memory; None where there is none.
            offsets: where in the bucket each gradient begins; ascending.
            numel: elements of the bucket. chunk: a multiple of 4096.
            dtype: what the gradients are if all have it; they are shown to the other ranks so, and else in float32.
            weight: of this rank's gradients.
            overwrite: the first of a step: what ``total`` held is forgotten.
            everywhere: every rank gets the whole sum.
            statistics: as of :meth:`all_reduce_`, of the whole bucket's sum.
        """
        self._native.add_to_owners(
            total, grads, offsets, numel, chunk, dtype, weight, overwrite, everywhere, statistics
        )

    def displacements(self, t: Tensor) -> list[int]:
        """By how many bytes each other rank's ``t`` lies behind this one's, as this process sees it.

        All ranks call it, where they reach each other, with memory of their own from :meth:`empty`; good while that
        lives.
        """
        addresses = self._impl(t).addresses(t)
        return [a - addresses[self.rank] for r, a in enumerate(addresses) if r != self.rank]

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of this communicator's own on a GPU: for sums beside a backward pass."""
        if device not in self._side:
            self._side[device] = torch.cuda.Stream(device)
        return self._side[device]

    def check(self) -> None:
        """Raises what has gone wrong on a GPU so far, as the next operation would. It does not wait for the GPU."""
        for impl in self._devices.values():
            impl.check()

    def close(self) -> None:
        """Leaves, when all that it has begun on a GPU has ended. Who waits for this rank then gets a PeerTimeout."""
        for impl in self._devices.values():
            impl.close()
        self._native.close()
        self._closed = True

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _impl(self, t: Tensor) -> Any:
        try:
            return self._native if t.is_cpu else self._on(t.device)  # a small sum takes little longer than t.device
        except AttributeError:
            _check_tensors(t)
            raise

    def _on(self, device: torch.device) -> Any:
        if device.type == "cpu":
            return self._native
        if device.type != "cuda":
            raise TypeError(f"deepfast: collectives take tensors on a CPU or a GPU, not on {device}")
        if device == torch.device(device.type):
            device = torch.device(device.type, torch.cuda.current_device())
        if device not in self._devices:
            self._devices[device] = across.connect(
                self._group, self.rank, self._hosts, device, self._native, self._peers, self.timeout.total_seconds()
            )
        return self._devices[device]

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._held_group()
        if group is None:
            raise RuntimeError("deepfast: the communicator's process group has been destroyed")
        return group

    def _factor(self, op: str, scale: float | None) -> float:
        if op not in ("sum", "avg"):
            raise ValueError(f'deepfast: op={op!r} is not known: choose "sum" or "avg"')
        factor = 1.0 if scale is None else float(scale)
        return factor / self.size if op == "avg" else factor


def _check_tensors(*values: Any) -> None:
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"deepfast: collectives take tensors, not {type(value).__name__}")


@library.custom_op("deepfast::all_reduce", mutates_args=())
def _all_reduce(t: Tensor, communicator: str, factor: float) -> Tensor:
    found = _named.get(communicator)
    if found is None:
        raise RuntimeError(f"deepfast: {communicator} is gone")
    out = t.clone(memory_format=torch.contiguous_format)
    found._impl(out).all_reduce_(out, factor, None, None)
    return out


@_all_reduce.register_fake
def _(t: Tensor, communicator: str, factor: float) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, str, float], output: Tensor) -> None:
    _, ctx.communicator, ctx.factor = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.deepfast.all_reduce(grad, ctx.communicator, ctx.factor), None, None


_all_reduce.register_autograd(_backward, setup_context=_save)
