"""Who else trains: what torchrun says of this process."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
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
    if world is not None and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cpu":
            atexit.register(_leave)
    return device


def _leave() -> None:
    """Ends gloo's threads: one that lets go of a tensor, some time after its sum, aborts a Python that is ending."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
        said: list[str | None] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(said, None if failure is None else str(failure) or type(failure).__name__)
        except RuntimeError as broken:  # somebody has died
            raise failure or broken from None
        failed = next((rank for rank, text in enumerate(said) if text is not None), None)
        if failed not in (None, dist.get_rank()):
            raise shared(f"{said[failed]} (rank {failed})")
    if failure is not None:
        raise failure
    return result


def of_rank_0(value: T) -> T:
    """The value that rank 0 has."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held, 0)
    return held[0]
