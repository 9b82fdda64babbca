"""A module of blocks and of all that is awkward to cut, its training at any stage, and all that this changes."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

import deepfast
from deepfast.optim.shards import is_sharded

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
DTYPES = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(30, 41)
        self.tall = nn.Linear(41, 30)
        self.norm = nn.LayerNorm(30)

    def forward(self, x):
        return x + self.tall(torch.tanh(self.wide(self.norm(x))))


class Tower(nn.Module):
    """Parameters without a dimension, of fewer rows than ranks, empty, tied, frozen, seldom and never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 30)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.transposed = nn.Parameter(torch.randn(30, 17).t() * 0.1)
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.few = nn.Parameter(torch.randn(3, 30))
        self.sometimes = nn.Parameter(torch.ones(30))
        self.never = nn.Parameter(torch.ones(5, 5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("shift", torch.full((30,), 0.125))
        self.head = nn.Linear(30, 97, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, both=True):
        x = self.embedding(ids) + self.shift
        for block in self.blocks:
            x = block(x)
        x = self.frozen(x) + (x @ self.transposed.t()) @ self.transposed + self.few.mean(0)
        return self.head(x * self.sometimes * self.scale if both else x * self.scale)


def engine(stage, precision="fp32", accumulation=1, net=Tower, optimizer="AdamW", config=None, **arguments):
    """An engine that clips only if told to, and gathers each block by itself."""
    return deepfast.initialize(
        model=net(),
        optimizer=lambda params: getattr(deepfast, optimizer)(params, **{"lr": 0.01, **arguments}),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **DTYPES[precision],
            **(config or {}),
        },
    )[0]


def micro_batch(step, nth):
    g = torch.Generator().manual_seed(1000 * step + nth)
    return torch.randint(97, (2, 7), generator=g), (step + nth) % 2 == 0


def loss_of(e, step, nth):
    ids, both = micro_batch(step, nth)
    return nn.functional.cross_entropy(e(ids, both).float().flatten(0, 1), ids.flatten())


def step_of(e, step, spoil=None, weights=False, backward=None):
    """One optimizer step; the micro-batches are dealt out in turn. Returns their mean loss, of all ranks.

    spoil(step, micro-batch) -> a factor of the loss; backward(engine, loss): instead of the engine's.
    """
    total, accumulation = torch.zeros(()), e.gradient_accumulation_steps()
    for k in range(accumulation):
        nth = k * SIZE + RANK
        loss = loss_of(e, step, nth)
        total += loss.detach()
        loss = loss if spoil is None else loss * spoil(step, nth)
        if backward is not None:
            backward(e, loss)
        else:
            e.backward(loss, *([1.0 + nth % 3] if weights else []))
        e.step()
    if SIZE > 1:
        dist.all_reduce(total)
    return float(total) / (SIZE * accumulation)


def whole(t):
    return (t.full_tensor() if is_sharded(t) else t).detach().contiguous().clone()


def put_together(part, value):
    """Of a state tensor that all ranks have parts of, all, in the parameter's shape."""
    if not part.sharded or value.dim() == 0:
        return whole(value)
    pieces = [None] * SIZE
    dist.all_gather_object(pieces, value)
    return torch.cat(pieces).as_strided(part.whole.shape, part.whole.stride()).contiguous()


def kept(e):
    """Whole, by name: each parameter in full (its master), its moments, its steps; and the scaler's state."""
    names = {part.whole: name for part, name in zip(e._parts(), e._names(), strict=True)}
    found = {name: whole(p).float() for name, p in e.module.named_parameters()}
    for name in ("frozen.weight", "frozen.bias"):  # which nothing but the cast rounds
        if name in found and e.dtype != torch.float32:
            found[name] = found[name].to(e.dtype).float()
    for part in e._parts():
        name, optimizer = names[part.whole], e.optimizer
        for key, value in optimizer.state.get(part.mine, {}).items():
            if key == "master":
                found[name] = put_together(part, optimizer.get_master(part.mine))
            else:
                found[f"{name}.{key}"] = put_together(part, optimizer.unpacked(part.mine, key, value))
    found["loss scale"], found["skipped"] = torch.tensor(float(e.loss_scale)), torch.tensor(e.skipped_steps)
    return found


def compare(found, expected, relative=0.0):
    """relative: by how much, of its norm, each tensor may be off; 0: not by a bit."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, b in expected.items():
        a = found[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        off, norm = (float(torch.linalg.vector_norm(t.double())) for t in (a.double() - b.double(), b))
        assert off <= relative * norm if relative else torch.equal(a, b), f"{name}: off by {off}, its norm is {norm}"
