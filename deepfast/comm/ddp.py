"""DistributedDataParallel with our all-reduce."""

# No `from __future__ import annotations`: DDP looks at the hook's own.

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast.comm.communicator import Communicator


def allreduce_hook(comm: Communicator, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook: ``ddp.register_comm_hook(comm, deepfast.comm.allreduce_hook)``.

    Averages the bucket in place. The mean is formed before it is rounded, so finite fp16 gradients stay finite (torch's
    own hooks divide after the cast, or sum first).
    """
    t = bucket.buffer()
    if not t.is_cuda:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(comm.all_reduce_(t, "avg"))
        return future
    future = torch.futures.Future(devices=[t.device])
    side = comm.side_stream(t.device)  # beside the backward pass
    side.wait_stream(torch.cuda.current_stream(t.device))
    with torch.cuda.stream(side):
        future.set_result(comm.all_reduce_(t, "avg"))  # DDP waits for what is on this stream by now
    return future
