"""Who else trains: what torchrun says of this process."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Before there is a group: this one keeps, as default arguments, the group that it finds when it is imported, for good.
import torch.distributed.nn.functional

from deepfast.errors import UserError

T = TypeVar("T")


def launched() -> tuple[int, int | None]:
    """(rank, world size) as torchrun has set them; (0, None) if this process was started by itself.

    Raises:
        UserError: where only some of the variables are set.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"WORLD_SIZE is set, {' and '.join(missing)} not: start the ranks with torchrun")
        return 0, None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def init_distributed(*_args: Any, **_options: Any) -> torch.device:
    """Joins the process group that torchrun has set up, if it has; returns this rank's device.

    Takes and ignores DeepSpeed's arguments.
    """
    world = launched()[1]
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    begin = world is not None and not dist.is_initialized()
    if begin:
        _join("nccl" if device.type == "cuda" else "gloo")
    if dist.is_initialized() and device.type == "cpu":
        atexit.unregister(settle)
        atexit.register(leave if begin else settle)
    return device


def _join(backend: str) -> None:
    """Joins the default group; after a restart, past the addresses that the dead ranks have left.

    torchrun's agent keeps one store for all restarts, and torch takes what it finds there: who is faster than its
    neighbour calls on a process that is gone. On one host the number of restarts tells lives apart. Several hosts each
    count their own; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin a new store.
    """
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"life{life}", store), rank=rank, world_size=size)


def leave() -> None:
    """Ends the process group, if there is one, and waits for its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()
    settle()


def settle() -> None:
    """Waits until gloo's threads sleep, 30 seconds at most.

    One that lets go of a tensor, some time after its sum, aborts a Python that is ending: "terminate called without an
    active exception". They end with their group, but a DeviceMesh may still have that.
    """
    deadline = time.monotonic() + 30
    time.sleep(0.1)  # without Python's lock: a thread that waits for it sleeps, too; and torch 2.10 names no threads
    while _gloo_runs() and time.monotonic() < deadline:
        time.sleep(0.01)


def _gloo_runs() -> bool:
    """Whether one of gloo's threads has work, or waits for a core."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if "(pt_gloo_runloop) R" in stat.read_text(encoding="ascii", errors="replace"):
                return True
    return False


class SharedError(UserError):
    """One that another rank has raised, and prints."""


def on_rank_0(work: Callable[[], None]) -> None:
    """Does ``work`` on rank 0, the others wait; a UserError raised in it is raised on every rank."""
    failure: list[str | None] = [None]
    error: UserError | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            work()
        except UserError as raised:
            failure, error = [str(raised)], raised
    if dist.is_initialized():
        dist.broadcast_object_list(failure, 0)
    if failure[0] is not None:
        raise error or SharedError(failure[0])


def on_every_rank(work: Callable[[], T], shared: type[SharedError] = SharedError) -> T:
    """Does ``work`` on all ranks, and returns what it has on this one; where it fails on one, it fails on all.

    Raises:
        Exception: what ``work`` has raised here; ``shared``, with its text, where it was another rank's. Where several
            have failed it is that of the lowest.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # of whatever kind: nobody is to wait for this rank
        failure = error
    if dist.is_initialized():
        try:
            lowest, text = _lowest_failure(None if failure is None else str(failure) or type(failure).__name__)
        except RuntimeError as broken:  # somebody has died
            raise failure or broken from None
        if lowest not in (None, dist.get_rank()):
            raise shared(f"{text} (rank {lowest})")
    if failure is not None:
        raise failure
    return result


_agreements = itertools.count()


def _lowest_failure(own: str | None) -> tuple[int | None, str]:
    """(rank, text) of the first rank that has one; (None, "") where none has.

    Through the group's store and a barrier, not through tensors: this may be the last thing that a script does, and a
    thread of gloo's that lets go of a tensor, some time after its sum, aborts a Python that is ending.
    """
    group: Any = dist.group.WORLD
    said = dist.PrefixStore(f"deepfast/said/{next(_agreements)}", group.get_group_store())
    if own is not None:
        said.set(str(dist.get_rank()), own)
        said.add("failures", 1)
    dist.barrier()
    if said.add("failures", 0) == 0:
        return None, ""
    lowest = next(rank for rank in range(dist.get_world_size()) if said.check([str(rank)]))
    return lowest, said.get(str(lowest)).decode()


def of_rank_0(value: T) -> T:
    """The value that rank 0 has."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held, 0)
    return held[0]
