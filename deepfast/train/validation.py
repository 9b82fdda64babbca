"""The loss on what is not trained on."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from deepfast.train.data import Held


@torch.no_grad()
def mean_loss(engine: Any, held: Held) -> float:
    """Mean loss of a token of ``held``, dropout off. All ranks call it, and all get the same.

    Nothing of training is touched: no random number is drawn, no gradient made, no micro-batch counted. All ranks run
    equally many forward passes (at stage 3 these bring the weights together): who has nothing left runs one in vain.
    """
    micro, world = engine.train_micro_batch_size_per_gpu(), engine.world_size
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    was_training = engine.training
    engine.eval()
    try:
        for start in range(0, held.count, micro * world):
            begin = start + engine.rank * micro
            size = min(micro, held.count - begin)
            ids = held.batch(begin, size) if size > 0 else held.batch(0, 1)
            ids = ids.to(engine.device)
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            if size > 0:
                total += loss.double() * size  # all sequences have equally many tokens
    finally:
        engine.train(was_training)
    if world > 1:
        dist.all_reduce(total)
    return float(total) / held.count


def perplexity(loss: float) -> float | None:
    """None where no number is so large."""
    return math.exp(loss) if loss < 700 else None
