"""Loaders of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler


class Anew(DistributedSampler[Any]):
    """Each pass over the data in another order, as on one rank, though nobody calls ``set_epoch``."""

    def __iter__(self) -> Iterator[Any]:
        order = super().__iter__()
        self.epoch += 1
        return order


def micro_batches(
    dataset: Any, batch_size: int, *, shuffle: bool = True, sampler: Any = None, **options: Any
) -> DataLoader[Any]:
    """A loader of which each rank's gives its own share of the dataset.

    An iterable dataset deals itself out, or not at all.

    Args:
        sampler: in the place of torch's ``DistributedSampler``.
        **options: of torch's ``DataLoader``.
    """
    whole = isinstance(dataset, torch.utils.data.IterableDataset)
    if not whole and not hasattr(dataset, "__getitem__"):
        raise TypeError(f"training data is a dataset (dataset[i], len(dataset)), not {type(dataset).__name__}")
    if not whole and sampler is None and len(dataset) == 0:
        raise ValueError(f"training data is empty: {type(dataset).__name__} of length 0")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if sampler is None and ranks > 1 and not whole:
        sampler = Anew(dataset, shuffle=shuffle)
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=shuffle and sampler is None and not whole, sampler=sampler, **options
    )
