"""Models whose constructors do with weights what scripts do, for zero_init_ranks.py."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.c_proj = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("positions", torch.arange(width, device=self.fc.weight.device))

    def forward(self, x):
        return x + self.scale * self.c_proj(self.fc(self.norm(x)).relu())


class Net(nn.Module):
    """Uneven rows, tied weights, frozen ones, children's weights drawn again by the parent in many ways."""

    def __init__(self, width=10, layers=3):
        super().__init__()
        self.wte = nn.Embedding(7, width, padding_idx=1)
        rates = torch.linspace(0, 0.1, layers).tolist()
        self.blocks = nn.ModuleList([Block(width) for _ in rates])
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.wte.weight
        self.bias = nn.Parameter(torch.rand(3))  # fewer than ranks
        self.precise = nn.Parameter(torch.randn(6, 2, dtype=torch.float64))
        self.apply(self._draw)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))
        self._touch()
        self.last = copy.deepcopy(self.blocks[-1])
        self.mean = self.blocks[0].fc.weight.mean().item()
        self.listed = self.blocks[0].norm.weight.tolist()
        self.scaled = self.blocks[0].fc.bias.detach().numpy() * 2
        with torch.no_grad():
            self.seen = self(torch.tensor([[1, 2, 3]]))

    @staticmethod
    def _draw(module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            module.weight.data[module.padding_idx].zero_()

    def _touch(self):
        first, second, third = self.blocks
        nn.init.orthogonal_(first.c_proj.weight)
        nn.init.trunc_normal_(second.c_proj.weight)
        nn.init.kaiming_uniform_(third.fc.weight, a=math.sqrt(5))
        with torch.no_grad():
            first.fc.weight[0].copy_(second.fc.weight[1])
            first.fc.weight.t().mul_(2)
            third.norm.weight += third.norm.weight
            second.fc.bias.copy_(torch.linspace(0, 1, len(second.fc.bias)))
            third.fc.bias[3:5] = 7
            third.fc.weight[[1, 4]] = third.fc.weight[torch.tensor([2, 0])]
            third.fc.weight[third.fc.weight > 0.3] = 0.3
            third.c_proj.weight.copy_(second.c_proj.weight * 3)
        second.norm.weight.data = torch.full_like(second.norm.weight, 4)
        third.norm.bias = nn.Parameter(torch.rand_like(third.norm.bias))
        first.norm.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Odd(nn.Module):
    """What is not cut."""

    def __init__(self):
        super().__init__()
        self.figure = nn.Parameter(torch.tensor(1.5))
        self.whole_numbers = nn.Parameter(torch.arange(8), requires_grad=False)
        self.complex = nn.Parameter(torch.randn(8, 2, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.randn(8, 5).t())
        self.none = nn.Parameter(torch.empty(0, 3))
        self.own_kind = Own(torch.randn(8))
        self.elsewhere = nn.Parameter(torch.empty(8, device="meta"))
        self.register_buffer("buffer", torch.randn(8))


class Own(nn.Parameter):
    pass


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        raise KeyError("in a constructor")


class Wide(nn.Module):
    """16 MiB in weights of 1 MiB."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)])
        self.apply(self._draw)

    @staticmethod
    def _draw(module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
