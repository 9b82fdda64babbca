"""Engines whose optimizer holds parts of parameters, as a rank of several does; made by hand, in one process."""

from __future__ import annotations

import torch
from engines import CONFIG
from torch import nn

import deepfast
from deepfast.engine.parts import Part


class Odd(nn.Module):
    """Parameters that lie in memory in many ways: row-major, transposed, channels last, a scalar, none at all, tied."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(5, 7)
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.conv = nn.Conv2d(3, 4, (2, 3)).to(memory_format=torch.channels_last)
        self.cube = nn.Parameter(torch.randn(2, 3, 5).permute(2, 0, 1))
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.norm = nn.BatchNorm1d(7)
        self.again = self.linear


def odd_engine(seed=0, **config) -> deepfast.Engine:
    return deepfast.initialize(model=Odd(seed), config={**CONFIG, **config})[0]


def shared_out(e: deepfast.Engine, rank: int, ranks: int, uneven: float = 1.0) -> deepfast.Engine:
    """Gives the optimizer one rank's parts. uneven: above 1, the first ranks get the less; some get nothing."""
    e.rank, e.world_size = rank, ranks
    for group in e.optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            begin, end = (int(p.numel() * (r / ranks) ** uneven) for r in (rank, rank + 1))
            run = torch.as_strided(p.detach(), (end - begin,), (1,), p.storage_offset() + begin)
            mine = nn.Parameter(run)
            group["params"][i] = mine
            e._gradients._sharded[mine] = Part(p, mine, begin, end)
    return e


def elements(part: Part, t: torch.Tensor) -> torch.Tensor:
    """Those of the whole's ``t`` that the part has, found by what lies in its memory."""
    if not part.sharded:
        return t
    numbers = torch.empty_strided(part.whole.shape, part.whole.stride(), dtype=torch.int64)
    flat = torch.as_strided(numbers, (part.whole.numel(),), (1,))
    flat.copy_(torch.arange(part.whole.numel()))
    wanted = torch.zeros(part.end - part.begin, dtype=t.dtype)
    inside = (numbers >= part.begin) & (numbers < part.end)
    wanted[numbers[inside] - part.begin] = t[inside]
    return wanted


def whole_state(e: deepfast.Engine, seed=1) -> dict[str, dict[str, torch.Tensor]]:
    """A state for each parameter, by its name: any numbers, the same for everybody."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for i, (name, p) in enumerate(e.module.named_parameters()):
        moments = {entry: torch.rand(p.shape, generator=g) for entry in ("exp_avg", "exp_avg_sq")}
        if p.dtype != torch.float32:
            moments["master"] = p.detach().float() * (1 + 1e-4 * torch.rand(p.shape, generator=g))  # rounds to p
        state[name] = {**moments, "step": torch.tensor(float(i))}
    return state


def give_state(e: deepfast.Engine, state: dict[str, dict[str, torch.Tensor]]) -> None:
    e.optimizer.init_state()
    for part, name in zip(e._parts(), e._names(), strict=True):
        for entry, t in state[name].items():
            own = t if entry == "step" else elements(part, t)
            if entry == "master":
                e.optimizer.set_master(part.mine, own)
            else:
                e.optimizer.state[part.mine][entry].copy_(own)


def check_state(e: deepfast.Engine, state: dict[str, dict[str, torch.Tensor]]) -> None:
    for part, name in zip(e._parts(), e._names(), strict=True):
        kept = e.optimizer.state[part.mine]
        assert kept.keys() == state[name].keys(), name
        for entry, t in state[name].items():
            found = e.optimizer.get_master(part.mine) if entry == "master" else kept[entry]
            assert torch.equal(found, t if entry == "step" else elements(part, t)), (name, entry)


def saved_by(engines: list[deepfast.Engine], directory, **options):
    """As their ranks would, each in a process of its own."""
    for e in engines:
        path = e.save_checkpoint(directory, wait=False, **options)
    for e in engines:
        e.wait_for_checkpoint()
    return path
