"""``init_process_group("deepfast")``: gloo or NCCL with our sums, and gradient buckets in our memory."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from deepfast import build
from deepfast.comm import rendezvous


def register_backend() -> None:
    """Makes ``torch.distributed.init_process_group("deepfast")`` work.

    On CPU tensors, all-reduce (SUM, and AVG of floats), all_gather_into_tensor and reduce_scatter_tensor (now called
    all_gather_single and reduce_scatter_single) are ours, and DDP's buckets lie in our memory; FSDP2's do after
    ``model.set_allocate_memory_from_process_group_for_comm(True)``.
    Every other collective is gloo's, and on CUDA tensors NCCL's. Subgroups of such a group are of the same kind.
    """
    if "deepfast" in dist.Backend.backend_list:
        return
    # Off in torch by default: that DDP asks a backend for its buckets' memory.
    os.environ.setdefault("DDP_DISABLE_COMM_MEM", "0")
    dist.Backend.register_backend("deepfast", _create, extended_api=True, devices=["cpu", "cuda"])


def _create(options: Any, _: Any) -> Any:
    rank, size, timeout = options.group_rank, options.group_size, options.timeout
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", options.store), rank, size, timeout=timeout)
    nccl = None
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", options.store), rank, size, nccl_options)
    _, native, _ = rendezvous.connect(dist.PrefixStore("deepfast", options.store), rank, size, timeout)
    return build.load_comm().ProcessGroup(rank, size, native, gloo, nccl)
