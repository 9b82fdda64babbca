"""GPUs played on the host, for collectives: CPU tensors, peer memory in files that all ranks map, real kernels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import played_cuda
from torch.multiprocessing.reductions import reduce_tensor

from deepfast import ops
from deepfast.comm import Communicator, across


def play(name: str, *more: str) -> None:
    """The kernels that :class:`Played` has, and its memory.

    "cuda", and their library: compiled for the host. "triton": in its interpreter, with TRITON_INTERPRET=1. "gpu", and
    which: real ones, on one GPU for all ranks.
    """
    if name == "cuda":
        os.environ["CUDA_ON_HOST_FIXED_BLOCKS"] = "1"
        chosen = played_cuda(Path(*more))
    else:
        chosen = ops.triton() if name == "triton" else ops.select(*more, torch.device("cuda"), torch.float32)
    across._kernels = lambda device: (0, chosen)
    across.symmetric_memory = of_one_gpu if name == "gpu" else in_files


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


def in_files(group: dist.ProcessGroup, device: torch.device):
    """Peer memory, see :data:`deepfast.comm.gpus.Allocate`, in files that all map."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def allocate(nbytes):
        names: list = [None] * size
        with tempfile.NamedTemporaryFile() as file:
            dist.all_gather_object(names, file.name, group=group)
            file.truncate(nbytes)
            dist.barrier(group)
            all_of_them = [torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8) for name in names]
            dist.barrier(group)
        return all_of_them[rank], [t.data_ptr() for t in all_of_them], all_of_them

    return allocate


def of_one_gpu(group: dist.ProcessGroup, device: torch.device):
    """Peer memory of processes that share a GPU; torch's symmetric memory wants one each."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def allocate(nbytes):
        mine = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        told: list = [None] * size
        dist.all_gather_object(told, reduce_tensor(mine), group=group)
        all_of_them = [mine if r == rank else rebuild(*how) for r, (rebuild, how) in enumerate(told)]
        return mine, [t.data_ptr() for t in all_of_them], all_of_them

    return allocate


class Played(Communicator):
    """A communicator that takes CPU tensors for a GPU's; or one GPU for as many as there are ranks."""

    def _impl(self, t):
        return self._on(t.device)

    def _on(self, device):
        if device not in self._devices:
            self._devices[device] = across.connect(
                self._group, self.rank, self._hosts, device, self._native, self._peers, self.timeout.total_seconds()
            )
        return self._devices[device]
