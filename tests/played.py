"""GPUs played on the host, for collectives: CPU tensors, peer memory in files that all ranks map, real kernels."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import played_cuda

from deepfast.comm import Communicator
from deepfast.comm.device import OnPeers


def backend(name: str, library: str = ""):
    """ "cuda": its kernels compiled for the host; "triton": its interpreter, where TRITON_INTERPRET is set."""
    if name == "cuda":
        os.environ["CUDA_ON_HOST_FIXED_BLOCKS"] = "1"
        return played_cuda(Path(library))
    from deepfast.kernels import backend as triton

    return triton


def exact_fma() -> bool:
    """Whether the fma of Triton's interpreter rounds once."""
    import triton
    import triton.language as tl

    @triton.jit
    def fma(x, y, z, out):
        tl.store(out, tl.fma(tl.load(x), tl.load(y), tl.load(z)))

    x, z, out = torch.tensor([1 + 2.0**-12]), torch.tensor([-1.0 - 2.0**-11]), torch.zeros(1)
    fma[(1,)](x, x, z, out)
    return out.item() == 2.0**-24


def files(place: Path, rank: int, size: int, meet):
    """Peer memory, see :data:`deepfast.comm.device.Allocate`. meet(): a barrier."""
    numbers = itertools.count()

    def allocate(nbytes):
        n = next(numbers)
        place.mkdir(exist_ok=True)
        mine = torch.from_file(str(place / f"{n}-{rank}"), shared=True, size=nbytes, dtype=torch.uint8)
        meet()
        names = [place / f"{n}-{r}" for r in range(size)]
        all_of_them = [
            mine if r == rank else torch.from_file(str(name), shared=True, size=nbytes, dtype=torch.uint8)
            for r, name in enumerate(names)
        ]
        meet()
        os.unlink(names[rank])
        return mine, [t.data_ptr() for t in all_of_them], all_of_them

    return allocate


def one_gpu(device: torch.device):
    """Peer memory of processes that share a GPU; torch's symmetric memory wants one each."""
    from torch.multiprocessing.reductions import reduce_tensor

    def allocate(nbytes):
        mine = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        told: list = [None] * dist.get_world_size()
        dist.all_gather_object(told, reduce_tensor(mine))
        rank = dist.get_rank()
        all_of_them = [mine if r == rank else rebuild(*how) for r, (rebuild, how) in enumerate(told)]
        return mine, [t.data_ptr() for t in all_of_them], all_of_them

    return allocate


def on_peers(chosen, native, peers, rank, size, device, place, timeout) -> OnPeers:
    def meet():
        native.all_reduce_(torch.zeros(1), 1.0, None, None)

    allocate = one_gpu(device) if device.type == "cuda" else files(place, rank, size, meet)
    found = OnPeers(rank, size, device, chosen, allocate, peers, timeout)
    meet()
    return found


class Played(Communicator):
    """A communicator that takes CPU tensors for a GPU's; and one GPU for as many as there are ranks."""

    kernels = None  # the backend
    place: Path
    _numbers = itertools.count()

    def _impl(self, t):
        return self._on(t.device)

    def _on(self, device):
        if device not in self._devices:
            number = torch.tensor([os.getpid() * 1000 + next(self._numbers) if self.rank == 0 else 0])
            self._native.all_reduce_(number, 1.0, None, None)
            place = self.place / f"peers-{number.item()}"
            self._devices[device] = on_peers(
                self.kernels, self._native, self._peers, self.rank, self.size, device, place,
                self.timeout.total_seconds()
            )  # fmt: skip
        return self._devices[device]
