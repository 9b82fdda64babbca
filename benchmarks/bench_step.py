"""The optimizer step against torch's own: at sizes where memory decides, and at sizes where the host does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from conftest import Case, compare, report
from torch import nn

import deepfast
from deepfast import memory

CPU = torch.device("cpu")
MILLIONS = 64 << 20


def streaming(numel: int) -> Case:
    """What this machine's memory allows: an in-place multiply of memory like our state's."""
    data = memory.zeros(numel, torch.float32, CPU)
    return Case("in-place multiply", lambda: data.mul_(1.0), None)


def parameter(numel: int, dtype: torch.dtype, huge: bool) -> nn.Parameter:
    data = memory.zeros(numel, dtype, CPU) if huge else torch.empty(numel, dtype=dtype)
    return nn.Parameter(data.copy_(torch.linspace(-1, 1, numel)))


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

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
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


def torchs(name: str, **options) -> dict[str, Callable]:
    """The variants of torch's optimizer, as functions of the parameters."""
    cls = getattr(torch.optim, name)
    return {
        "torch fused": lambda params: cls(params, lr=1e-3, fused=True, **options),
        "torch foreach": lambda params: cls(params, lr=1e-3, foreach=True, **options),
    }


# title -> (ours, peers, bytes an element: read and written)
FP32 = {
    "AdamW": (lambda p: deepfast.AdamW(p, lr=1e-3), torchs("AdamW"), 28),
    "SGD": (lambda p: deepfast.SGD(p, lr=1e-3), torchs("SGD"), 12),
    "SGD with momentum": (lambda p: deepfast.SGD(p, lr=1e-3, momentum=0.9), torchs("SGD", momentum=0.9), 20),
    "Lion": (lambda p: deepfast.Lion(p, lr=1e-3), {"torch foreach": lambda p: ForeachLion(p, lr=1e-3)}, 20),
    "LAMB": (lambda p: deepfast.LAMB(p, lr=1e-3), {"torch foreach": lambda p: ForeachLAMB(p, lr=1e-3)}, 44),
    "Adagrad": (lambda p: deepfast.Adagrad(p, lr=1e-3), torchs("Adagrad"), 20),
}


@pytest.mark.parametrize("pages", ["huge pages", "ordinary pages"])
@pytest.mark.parametrize("name", FP32)
def test_fp32_64m(name, pages):
    ours, peers, bytes_per_element = FP32[name]
    huge, gradient = pages == "huge pages", parameter(MILLIONS, torch.float32, pages == "huge pages").detach()

    def case(title: str, make: Callable) -> Case:
        p = parameter(MILLIONS, torch.float32, huge)
        p.grad = gradient
        return Case(title, make([p]).step, p[:100_000].detach)

    compare(
        f"{name}, fp32, 64M parameters, parameters and gradients in {pages}",
        [case("deepfast", ours), *(case(title, make) for title, make in peers.items()), streaming(MILLIONS)],
        bytes_moved=bytes_per_element * MILLIONS,
        rounds=9,
    )


@pytest.mark.parametrize("pages", ["huge pages", "ordinary pages"])
def test_full_fp16_step_64m(pages):
    """Unscale, check, norm, clip, AdamW, master, fp16 weight: 30 bytes a parameter, against torch's parts."""
    n, huge = MILLIONS, pages == "huge pages"
    ours, theirs = parameter(n, torch.float16, huge), parameter(n, torch.float16, huge)
    gradient = parameter(n, torch.float16, huge).detach()
    ours.grad = gradient
    mine = deepfast.AdamW([ours], lr=1e-3, max_grad_norm=1.0)
    scaler = deepfast.LossScaler(init_scale=1024.0)

    def fused() -> None:
        scaler.step(mine)
        scaler.update()

    master = nn.Parameter(theirs.detach().float())
    torchs = torch.optim.AdamW([master], lr=1e-3, fused=True)

    def recipe() -> None:
        master.grad = gradient.float().mul_(1 / 1024)
        if master.grad.isfinite().all():
            nn.utils.clip_grad_norm_([master], 1.0)
            torchs.step()
            theirs.data.copy_(master.data)

    compare(
        f"full fp16 step, 64M parameters, parameters and gradients in {pages}",
        [
            Case("deepfast", fused, ours[:1000].detach().float),
            Case("torch's parts", recipe, theirs[:1000].detach().float),
            streaming(n),
        ],
        bytes_moved=30 * n,
        tolerance=1e-3,
        rounds=9,
    )


def many(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=g) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g) * 0.01
    return params


def against_torch_fused(title: str, shapes: list[tuple[int, ...]], rounds: int, bytes_moved: int = 0) -> None:
    ours, theirs = many(shapes), many(shapes)
    mine, torchs = deepfast.AdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, fused=True)
    compare(
        title,
        [
            Case("deepfast", mine.step, lambda: torch.cat([p.detach().flatten()[:1000] for p in ours])),
            Case("torch fused", torchs.step, lambda: torch.cat([p.detach().flatten()[:1000] for p in theirs])),
        ],
        rounds=rounds,
        bytes_moved=bytes_moved,
    )


def test_2000_tensors_of_256():
    """One parallel region over all of them."""
    against_torch_fused("AdamW, fp32, 2000 tensors of 256", [(256,)] * 2000, 101)


def test_gpt2_124m():
    """GPT-2's real shapes: 148 tensors, 124 million parameters."""
    layer = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,),
             (3072, 768), (768,)]  # fmt: skip
    shapes = [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]
    numel = sum(torch.Size(s).numel() for s in shapes)
    assert numel == 124_439_808
    against_torch_fused("AdamW, fp32, GPT-2 124M (148 tensors)", shapes, 9, 28 * numel)


@pytest.mark.parametrize("kind", ["parameters", "DTensors"])
def test_host_time_of_10000(kind):
    """Of 4 elements each: what is left is the host's work. (torch's first fused step over DTensors takes minutes.)"""
    if kind == "DTensors":
        from torch.distributed.tensor import DTensor, Shard

        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            mesh = dist.init_device_mesh("cpu", (1,))

        def make() -> list[nn.Parameter]:
            def sharded() -> DTensor:
                return DTensor.from_local(torch.ones(4), mesh, [Shard(0)], run_check=False)

            params = [nn.Parameter(sharded()) for _ in range(10_000)]
            for p in params:
                p.grad = sharded()
            return params
    else:

        def make() -> list[nn.Parameter]:
            return many([(4,)] * 10_000)

    ours, theirs = make(), make()
    mine, torchs = deepfast.AdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, fused=True)

    def values(params: list[nn.Parameter]) -> torch.Tensor:
        return torch.cat([getattr(p, "_local_tensor", p).detach() for p in params[:100]])

    row = compare(
        f"AdamW, fp32, 10,000 {kind} of 4",
        [Case("deepfast", mine.step, lambda: values(ours)), Case("torch fused", torchs.step, lambda: values(theirs))],
        rounds=15,
    )
    report({
        "title": f"host time, 10,000 {kind}",
        "us_per_tensor": {name: round(ms / 10, 3) for name, ms in row["ms"].items()},
    })  # fmt: skip
    if kind == "DTensors":
        dist.destroy_process_group()
