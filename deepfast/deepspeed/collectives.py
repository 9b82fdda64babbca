"""DeepSpeed's ``comm``: torch.distributed, where ranks were launched; else a process that is rank 0 of 1.

A function that is not defined here is torch.distributed's of that name. The group that it needs is made when there is
none yet: of the ranks that were launched, or of this process alone, so that a script runs as one process, too.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepfast.engine import ranks


def init_distributed(*_args: Any, **_options: Any) -> None:
    """Joins the ranks that were launched together; a process that was not launched is a group of one from here on.

    Takes and ignores DeepSpeed's arguments: the backend is NCCL on GPUs and gloo on CPUs.
    """
    ranks.init_distributed()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(ranks.leave)


def destroy_process_group(group: Any = None) -> None:
    if dist.is_initialized():
        dist.destroy_process_group(group)


def get_rank(group: Any = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else ranks.launched()[0]


def get_world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else ranks.launched()[1] or 1


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world_group() -> Any:
    if not dist.is_initialized():
        init_distributed()
    return dist.group.WORLD


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return dist.get_process_group_ranks(get_world_group() if group is None else group)


def __getattr__(name: str) -> Callable[..., Any]:
    theirs = getattr(dist, name)

    @functools.wraps(theirs)
    def call(*args: Any, prof: bool = False, log_name: str = "", debug: Any = None, **options: Any) -> Any:
        if not dist.is_initialized():
            init_distributed()
        return theirs(*args, **options)

    return call
