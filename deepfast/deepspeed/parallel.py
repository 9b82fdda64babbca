"""DeepSpeed's groups of ranks: all ranks train the same model on different data, so there is one."""

from __future__ import annotations

from typing import Any

from deepfast.deepspeed import collectives


def _get_data_parallel_group() -> Any:
    return collectives.get_world_group()


def _get_data_parallel_rank() -> int:
    return collectives.get_rank()


def _get_data_parallel_world_size() -> int:
    return collectives.get_world_size()


def _get_data_parallel_group_ranks() -> list[int]:
    return list(range(collectives.get_world_size()))


def _get_broadcast_src_rank() -> int:
    return 0


def zero() -> int:
    """This rank among those that share one copy of a model: itself."""
    return 0


def one() -> int:
    """How many those are."""
    return 1
