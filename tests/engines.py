"""A small model, an engine around it, data to train it, and what of it is compared."""

from __future__ import annotations

import torch
from torch import nn

import deepfast

CONFIG = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "optimizer": {"params": {"lr": 0.01}},
    "gradient_clipping": 0,
}


def model(seed=0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3), **options)


def engine(config=None, seed=0, **options) -> deepfast.Engine:
    return deepfast.initialize(model=model(seed), config={**CONFIG, **(config or {})}, **options)[0]


def batches(count, size=2):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g), torch.randn(size, 3, generator=g)) for _ in range(count)]


def train(e, data, weights=None) -> list[float]:
    losses = []
    for i, (x, y) in enumerate(data):
        loss = nn.functional.mse_loss(e(x).to(y.dtype), y)  # before torch 2.12 this mean takes no two dtypes
        e.backward(loss, *([] if weights is None else [weights[i]]))
        e.step()
        losses.append(loss.item())
    return losses


def state(e) -> list[torch.Tensor]:
    return [p.detach().clone() for p in e.module.parameters()]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
