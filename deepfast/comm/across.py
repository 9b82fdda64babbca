"""Collectives over GPUs, wherever they are: our kernels on each host, ``torch.distributed`` between hosts."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import ops
from deepfast.comm.by_torch import ByTorch
from deepfast.comm.gpus import OnPeers, symmetric_memory
from deepfast.comm.values import HALVES, check_summed, nothing, tell

log = logging.getLogger(__name__)
FULL = -2  # told for the number of a rank's kernels: there are some, but no place for them
GRACE = 5.0  # seconds for the other hosts, after their own timeouts


class AcrossHosts:
    """As many GPUs on every host. Each sums one part of the tensor for its host, over peer memory; the same parts of
    all hosts are summed between them, by all GPUs at once, each over its own link; and every host gathers the parts.

    16 bits are summed in fp32 throughout and rounded once, by the gathering kernel. Reduce-scatter and all-gather are
    torch.distributed's. A host whose sum fails tells the others by NaN, once; who waits for it in an operation after
    that one waits as long as torch.distributed does.

    Args:
        local: collectives among this host's ranks.
        here: how many these are.
        between: the ranks, one a host, that come at the same place of their hosts.
        whole: collectives among all.
    """

    def __init__(self, local: OnPeers, here: int, between: dist.ProcessGroup, whole: ByTorch) -> None:
        self._local, self._here, self._between = local, here, between
        self.reduce_scatter, self.all_gather = whole.reduce_scatter, whole.all_gather
        self.empty, self.close, self.check = local.empty, local.close, local.check

    def all_reduce_(self, t: Tensor, factor: float, statistics: Tensor | None, found_inf: Tensor | None) -> None:
        check_summed(t, factor)
        if t.numel() == 0:
            nothing(statistics)
            return
        flat = t.contiguous().view(-1)
        each = -(-t.numel() // self._here)
        parts = flat if each * self._here == t.numel() else flat.new_zeros(each * self._here)
        if parts is not flat:
            parts[: t.numel()] = flat
        part = torch.empty(each, dtype=torch.float32 if t.dtype in HALVES else t.dtype, device=t.device)
        if t.is_floating_point():
            part.fill_(torch.nan)  # where this host's sum fails, the others must know
        self._local.reduce_scatter(part, parts.view(self._here, each), factor, None, None)
        dist.all_reduce(part, group=self._between)
        self._local.all_gather(parts.view(self._here, each), part)
        if parts is not flat or not t.is_contiguous():
            t.copy_(parts[: t.numel()].view(t.shape))
        tell(t, self._local.failed(), statistics, found_inf)


def _subgroup(group: dist.ProcessGroup, ranks: Sequence[int]) -> dist.ProcessGroup:
    names = dist.get_process_group_ranks(group)
    return dist.new_group([names[r] for r in ranks], backend=dist.get_backend(group), use_local_synchronization=True)


def _kernels(device: torch.device) -> tuple[int, Any]:
    """Those that a tensor on ``device`` is given to, and a number for them; < 0: they have no collectives."""
    backend = ops.select(ops.forced(), device, torch.float32)
    kinds = [ops.cuda(), ops.triton()]
    return (kinds.index(backend) if backend in kinds else -1), backend


class Place:
    """A communicator's on a GPU. The thread blocks of its kernels wait for those on other GPUs; so a GPU must hold the
    blocks of all its communicators at once, or each GPU might hold those that the others do not. Free again when nobody
    holds it any longer."""

    _taken: ClassVar[dict[torch.device, weakref.WeakSet[Place]]] = {}
    _lock = threading.Lock()

    @classmethod
    def take(cls, device: torch.device, each: int) -> Place | None:
        """None: there is none left. each: how many multiprocessors a communicator fills."""
        with cls._lock:
            taken = cls._taken.setdefault(device, weakref.WeakSet())
            if (len(taken) + 1) * each > multiprocessors(device):
                return None
            place = cls()
            taken.add(place)
            return place


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def connect(group: dist.ProcessGroup, rank: int, hosts: list[list[int]], device: torch.device, native: Any, peers: Any,
            timeout: float) -> OnPeers | AcrossHosts | ByTorch:  # fmt: skip
    """Collectives for tensors on ``device``; all ranks call it together. native, peers: of the CPU's communicator.

    Peer memory where all ranks have it, the same kernels and a place on their GPU, and all hosts as many ranks; else
    torch.distributed, after a warning.
    """
    (here,) = (ranks for ranks in hosts if rank in ranks)
    size = sum(map(len, hosts))
    own, backend = _kernels(device)
    place = None
    if own >= 0:
        most, *_, each = backend.peer_layout()
        if len(here) > most:
            own = -1
        elif (place := Place.take(device, each)) is None:
            own = FULL
    everybodys = torch.empty(size, dtype=torch.int64)
    native.all_gather(everybodys, torch.tensor([own]))
    found: OnPeers | None = None
    why = "some ranks have no kernels for it, or others"
    if (everybodys == FULL).any():
        why = "a GPU holds no more communicators at once; close those that have done their work"
    elif len({len(ranks) for ranks in hosts}) > 1:
        why = "some hosts have more ranks than others"
    elif own >= 0 and (everybodys == own).all():
        try:
            allocate = symmetric_memory(group if len(hosts) == 1 else _subgroup(group, here), device)
            patience = timeout + GRACE if len(hosts) > 1 else 0.0
            found = OnPeers(rank, here, device, backend, allocate, peers, timeout, patience, place)
        except Exception as error:  # whatever torch says where GPUs do not see each other's memory
            why = str(error).partition("\n")[0]
    agreed = torch.tensor([found is not None], dtype=torch.int32)
    native.all_reduce_(agreed, 1.0, None, None)  # and nobody starts before everybody's memory is zeroed
    by_torch = ByTorch(group, size, device)
    if found is None or agreed.item() < size:
        log.warning("GPUs exchange gradients by torch.distributed: %s", why)
        return by_torch
    if len(hosts) == 1:
        return found
    (column,) = (ranks for ranks in zip(*hosts, strict=True) if rank in ranks)
    return AcrossHosts(found, len(here), _subgroup(group, column), by_torch)
