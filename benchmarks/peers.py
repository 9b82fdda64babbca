"""Who else makes an optimizer step on a CPU.

torch's optimizers; Lion and LAMB, which torch has not, written with torch's foreach functions; torch's recipe for
16-bit weights; DeepSpeed's CPU optimizers, optimi, bitsandbytes and torchao. FlashOptim asks for a GPU, and is skipped
with what it says. Two are not here, because their updates are others on a CPU: after two steps torchao's AdamW4bit is
12 % of the update off, bitsandbytes' LAMB 70 %. torchao's are skipped with AVX-512 from 64M elements on: they
write past their memory there (measured with torchao 0.18 and torch 2.13 alone: "double free or corruption").
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sysconfig
from collections.abc import Callable

import torch
from measure import Contender, Step
from torch import Tensor, nn

LR, DECAY = 1e-2, 0.1
SCALE, NORM, EPS = 1024.0, 0.1, 1e-5  # of the 16-bit step; with this eps a wrong scale shows in Adam's updates, too
LOW_BITS = 0.02  # of the update, what 8-bit moments may lose; measured: torchao 0.5 % (fp8 0.9 %), bitsandbytes 0.5 %
BY_CHANCE = 0.05  # of an update, what rounding a first moment to 8 bits by chance adds and takes; measured: 2.3 %
NORMS = 0.02  # of an update that hangs on torch's norms: it adds them up in fp32, 64M elements are 0.5 % off
Params = list[Tensor]


def stepping(cls: Callable, **options: object) -> Callable[[Params], Step]:
    return lambda params: cls(params, lr=LR, **options).step


def torchs(name: str, *, fused: bool = True, **options: object) -> dict[str, Contender]:
    """The variants of torch's optimizer."""
    cls = getattr(torch.optim, name)
    kinds = {"torch_loop": {"foreach": False}, "torch_foreach": {"foreach": True}, "torch_fused": {"fused": True}}
    if not fused:
        del kinds["torch_fused"]
    return {kind: Contender(stepping(cls, **options, **chosen)) for kind, chosen in kinds.items()}


def of(package: str, name: str, tolerance: float = 0, pip: str = "", **options: object) -> Contender:
    """An optimizer of another package, imported when its turn comes."""

    def make(params: Params) -> Step:
        return getattr(importlib.import_module(package), name)(params, lr=LR, **options).step

    return Contender(make, tolerance, pip or package.partition(".")[0])


def deepspeeds(kind: str, **options: object) -> Contender:
    """Compiled by DeepSpeed when it is first asked for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]  # ninja
    return of(f"deepspeed.ops.{kind.lower()}", f"DeepSpeedCPU{kind}", **options)


def torchao(name: str, **options: object) -> Contender:
    whole = of("torchao.optim", name, LOW_BITS, **options)

    def make(params: Params) -> Step:
        if torch.backends.cpu.get_cpu_capability() == "AVX512" and max(p.numel() for p in params) >= 64 << 20:
            raise NotImplementedError("with AVX-512 it writes past its memory, from 64M elements on")
        return whole.make(params)

    return dataclasses.replace(whole, make=make)


ADAMW = {
    "deepspeed": deepspeeds("Adam", weight_decay=DECAY),
    "optimi": of("optimi", "AdamW", pip="torch-optimi", betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY),
    "bitsandbytes": of("bitsandbytes.optim", "AdamW", weight_decay=DECAY),
    "bitsandbytes_8bit": of("bitsandbytes.optim", "AdamW8bit", LOW_BITS, weight_decay=DECAY),
    "torchao_8bit": torchao("AdamW8bit", weight_decay=DECAY),
    "torchao_fp8": torchao("AdamWFp8", weight_decay=DECAY),
    "flashoptim": of("flashoptim", "FlashAdamW", LOW_BITS, weight_decay=DECAY),
}


class ForeachLion(torch.optim.Optimizer):
    """Lion as one would write it in torch; there is no fused one."""

    def __init__(self, params, lr, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, (beta1, beta2) = group["params"], group["betas"]
            grads = [p.grad for p in params]
            moments = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            updates = torch._foreach_lerp(moments, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1 - beta2)


class ForeachLAMB(torch.optim.Optimizer):
    """LAMB likewise."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=DECAY):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for group in self.param_groups:
            params, (beta1, beta2) = group["params"], group["betas"]
            grads = [p.grad for p in params]
            m, v = ([self.state[p].setdefault(k, torch.zeros_like(p)) for p in params] for k in ("m", "v"))
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominators = torch._foreach_sqrt(v)
            torch._foreach_div_(denominators, (1 - beta2**self.t) ** 0.5)
            torch._foreach_add_(denominators, group["eps"])
            updates = torch._foreach_div(m, denominators)
            torch._foreach_div_(updates, 1 - beta1**self.t)
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            lengths, norms = torch._foreach_norm(params), torch._foreach_norm(updates)
            ratios = [(a / b).item() for a, b in zip(lengths, norms, strict=True)]
            torch._foreach_mul_(updates, ratios)
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def recipe(optimizer: Contender, scale: float = SCALE) -> Contender:
    """Mixed precision from torch's parts: unscale, check, clip, step an fp32 master, write the 16-bit weight."""

    def make(params: Params) -> Step:
        masters = [nn.Parameter(p.detach().float()) for p in params]
        update = optimizer.make(masters)

        def step() -> None:
            for master, p in zip(masters, params, strict=True):
                master.grad = p.grad.float().mul_(1 / scale)
            if all(master.grad.isfinite().all() for master in masters):
                nn.utils.clip_grad_norm_(masters, NORM)
                update()
                for master, p in zip(masters, params, strict=True):
                    p.data.copy_(master.data)

        return step

    return Contender(make, NORMS, optimizer.package)
