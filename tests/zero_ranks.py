"""Run by test_zero.py on 1 to 4 ranks: an engine at stages 0, 1 and 2, each check to the last bit.

What one process makes of all the micro-batches is computed first, before there is a process group.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import NAMES, TYPICAL
from checks import run_checks
from conftest import HANGS
from torch import nn

import deepfast
from deepfast.reference import round_master

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
DTYPES = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}}}
ACCUMULATION = {"one": 1, "several": 3}
STEPS = 3


class Net(nn.Module):
    """Parameters of odd sizes: of many blocks, of a few elements, tied, frozen, empty, transposed, seldom used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 30)
        self.wide = nn.Linear(30, 1301)
        self.tall = nn.Linear(1301, 30)
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.transposed = nn.Parameter(torch.randn(30, 17).t() * 0.1)
        self.long = nn.Parameter(torch.randn(30, 1700) * 0.1)
        self.norm = nn.LayerNorm(17)
        self.sometimes = nn.Parameter(torch.ones(17))
        self.never = nn.Parameter(torch.ones(5, 5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(17, 30, bias=False)
        self.tied = nn.Linear(30, 97, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, ids, both):
        x = self.embedding(ids)
        x = self.frozen(x + self.tall(torch.tanh(self.wide(x))))
        x = x + torch.tanh(x @ self.long) @ self.long.t()
        x = self.norm(x @ self.transposed.t().to(x.dtype))
        return self.tied(self.head(x * self.sometimes if both else x))

    def loss(self, out, ids):
        return nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten())


class Exact(Net):
    """The same parameters, with gradients that are small multiples of a power of two: sums of them are exact in any
    order and of every type, so that ranks, micro-batches and devices all come to the same bits."""

    def forward(self, ids, both):
        g = torch.Generator().manual_seed(int(ids.sum()))
        unused = {"never", "empty", *([] if both else ["sometimes"])}
        terms = []
        for name, p in self.named_parameters():
            given = torch.randint(-31, 32, p.shape, generator=g) / 32
            if p.requires_grad and name not in unused:
                terms.append((p * given.to(p)).sum(dtype=torch.float32))
        return torch.stack(terms)

    def loss(self, out, ids):
        return out.sum()


def run(
    config,
    stage,
    accumulation,
    *,
    size=None,
    optimizer="AdamW",
    spoil=None,
    net=Net,
    steps=STEPS,
    arguments=(),
    **options,
):
    """Trains; returns the engine and the losses of this rank. spoil(step, micro-batch) -> a factor of the loss."""
    size = SIZE if size is None else size
    arguments = {"lr": 0.01, **TYPICAL[optimizer], **dict(arguments)}
    engine, *_ = deepfast.initialize(
        model=net(),
        optimizer=lambda params: getattr(deepfast, optimizer)(params, **arguments),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": accumulation * SIZE // size,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0,
            **config,
        },
        **options,
    )
    for step in range(steps):
        train(engine, step, size, spoil)
    return engine


def train(engine, step, size, spoil=None, weights=False):
    rank = RANK if size > 1 else 0
    for k in range(engine.gradient_accumulation_steps()):
        nth = k * size + rank  # dealt out in turn
        torch.manual_seed(1000 * step + nth)
        ids = torch.randint(97, (4, 7)).to(engine.device)
        out = engine(ids, (step + nth) % 2 == 0).float()
        loss = engine.module.loss(out, ids)
        if spoil is not None:
            loss = loss * spoil(step, nth)
        engine.backward(loss, *([1.0 + nth % 3] if weights else []))
        engine.step()


def kept(engine):
    """All that a step changes, on the CPU: weights, whole state by name, norm, scale."""
    found = {name: p.detach().to("cpu", copy=True) for name, p in engine.module.named_parameters()}
    names = {p: name for name, p in engine.module.named_parameters()}
    for part in engine._parts():
        for key, value in engine.optimizer.state.get(part.mine, {}).items():
            if key == "master":
                value = engine.optimizer.get_master(part.mine)
            value = engine.optimizer.unpacked(part.mine, key, value)
            found[f"{names[part.whole]}.{key}"] = whole(part, value)
    found["norm"] = torch.tensor(engine.get_global_grad_norm())
    found["scale"] = torch.tensor(engine.loss_scale)
    found["skipped"] = torch.tensor(engine.skipped_steps)
    return found


def in_memory(t):
    """Its elements as they lie in memory, 1-D, on the CPU."""
    return t.detach().as_strided((t.numel(),), (1,)).to("cpu", copy=True)


def whole(part, value):
    """A state tensor put together from all ranks' parts, as it lies in memory."""
    if not part.sharded:
        return in_memory(value)
    if value.dim() == 0:
        same_everywhere(value)
        return in_memory(value)
    pieces = [None] * SIZE
    dist.all_gather_object(pieces, value.cpu())
    joined = torch.cat(pieces)
    assert joined.numel() == part.whole.numel()
    return joined


def same_everywhere(t):
    everyone = [None] * SIZE
    t = t.detach().cpu()
    dist.all_gather_object(everyone, t)
    for other in everyone:
        same_bits(t, other)


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        try:
            same_bits(a[name], b[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def overflows(step, nth):
    return float("inf") if step == 1 and nth == SIZE - 1 else 1.0  # on the last rank alone


CASES = {
    **{f"{d} {a}": (DTYPES[d], ACCUMULATION[a], {}) for d, a in itertools.product(DTYPES, ACCUMULATION)},
    "clipped": ({"gradient_clipping": 0.05}, 2, {}),
    "clipped fp16": ({**DTYPES["fp16"], "gradient_clipping": 0.05}, 1, {}),
    "overflow": (DTYPES["fp16"], 2, {"spoil": overflows}),
    "static scale": ({**DTYPES["fp16"], "train_loss_scale": 128.0}, 1, {"spoil": overflows}),
    "fp32 master": (DTYPES["fp16"], 1, {"arguments": {"master": "fp32"}}),
    "bf16 moments": (DTYPES["bf16"], 3, {"arguments": {"state_dtype": "bf16"}}),
    "LAMB, bf16 moments": (DTYPES["fp16"], 1, {"optimizer": "LAMB", "arguments": {"state_dtype": "bf16"}}),
    "int8 moments": (DTYPES["bf16"], 2, {"arguments": {"state_dtype": "int8", "amsgrad": False}}),
    "LAMB, int8 moments": (DTYPES["fp16"], 1, {"optimizer": "LAMB", "arguments": {"state_dtype": "int8"}}),
    "by chance": (DTYPES["bf16"], 1, {"optimizer": "Lion", "arguments": {"master": "none", "rounding": "stochastic"}}),
    "no master": (DTYPES["fp16"], 1, {"optimizer": "SGD", "arguments": {"master": "none", "lr": 0.1}}),
    **{f"{name} bf16": ({**DTYPES["bf16"], "gradient_clipping": 0.5}, 1, {"optimizer": name}) for name in NAMES},
}
ALONE = {}  # what one process has kept


def before_there_are_ranks(cases=CASES):
    for name, (config, accumulation, options) in cases.items():
        ALONE[name] = kept(run(config, 0, accumulation, size=1, dist_init_required=False, **options))


def check_stages(name):
    config, accumulation, options = CASES[name]
    for stage in (0, 1, 2):
        engine = run(config, stage, accumulation, **options)
        assert engine.zero_optimization_stage() == stage
        found = kept(engine)
        for value in found.values():
            same_everywhere(value)
        same(found, ALONE[name])
        assert engine.skipped_steps == ("spoil" in options)
        fresh = {n: in_memory(p) for n, p in Net().named_parameters()}  # what masters begin at, and their weights
        masters = {n: found.get(f"{n}.master", p.detach()) for n, p in engine.module.named_parameters()}
        moved = {n for n, t in masters.items() if not any(torch.equal(in_memory(t), begin.to(t.dtype)) for begin in (
            fresh[n], round_master(fresh[n], engine.dtype)))}  # fmt: skip
        assert moved.isdisjoint({"never", "frozen.weight", "frozen.bias", "empty"})
        still = fresh.keys() - moved - {"never", "frozen.weight", "frozen.bias", "empty"}
        assert not still, still


def check_each_rank_keeps_its_part():
    engine = run(DTYPES["fp16"], 2, 1)
    states = engine.optimizer.state.values()
    held = sum(t.numel() for state in states for key, t in state.items() if key != "step")
    kinds = {len(state) - 1 for state in states}  # master and moments
    used = sum(p.numel() for n, p in engine.module.named_parameters() if not n.startswith(("never", "frozen")))
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, held)
    assert {sum(everyone)} == {kind * used for kind in kinds}
    if SIZE > 1:
        assert RANK == 0 or any(0 < part.begin < part.end for part in engine._parts()), "parameters are cut"
        assert max(everyone) < sum(everyone)
        assert sum(t.numel() for t in engine._gradients.sums.sums) < used


CHECKS = {
    **{f"stages: {name}": functools.partial(check_stages, name) for name in CASES},
    "parts": check_each_rank_keeps_its_part,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    before_there_are_ranks()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS))
    chosen = {name: check for name, check in CHECKS.items() if name.startswith(tuple(sys.argv[2:]) or "")}
    run_checks(chosen, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
