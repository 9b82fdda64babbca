"""Run by test_by_hand.py on several ranks: gradients by hand at each stage, in each precision."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from engines import model
from torch import nn

import deepfast
from deepfast.engine.by_hand import safe_get_full_grad, safe_set_full_grad

PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}}}
mse = nn.functional.mse_loss


def engine(stage, accumulation, precision, clip=0.0):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "optimizer": {"params": {"lr": 0.01}},
        **PRECISIONS[precision],
    }
    return deepfast.initialize(model=model(), config=config)[0]


def steps(e, by_hand, count=2):
    """Optimizer steps, by_hand called before each."""
    g = torch.Generator().manual_seed(5)
    accumulation, world = e.gradient_accumulation_steps(), e.world_size
    batches = []
    for _ in range(count):
        micro = [(torch.randn(2, 6, generator=g), torch.randn(2, 3, generator=g)) for _ in range(accumulation * world)]
        batches.append(micro)
        for i in range(accumulation):
            x, y = micro[i * world + e.rank]
            e.backward(mse(e(x).to(y.dtype), y))
            if i == accumulation - 1:
                by_hand(micro)
            e.step()


def weights(e):
    return [p.detach().clone() for p in e.module.parameters()]


def check(stage, accumulation, precision):
    e, alone = engine(stage, accumulation, precision), engine(stage, accumulation, precision)

    def look(micro):
        twin = model()
        twin.load_state_dict({name: t.float() for name, t in e.module.state_dict().items()})
        for x, y in micro:
            (mse(twin(x), y) / len(micro)).backward()
        tolerance = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[precision]
        for p, q in zip(e.module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(safe_get_full_grad(p), q.grad, rtol=tolerance, atol=tolerance)
            with pytest.raises(RuntimeError, match="safe_get_full_grad"):
                p.grad.norm()

    steps(e, look)
    steps(alone, lambda _: None)
    assert all(map(torch.equal, weights(e), weights(alone))), "looking has changed something"

    e, clipped = engine(stage, accumulation, precision), engine(stage, accumulation, precision, clip=0.01)

    def clip(_):
        grads = [safe_get_full_grad(p) for p in e.module.parameters()]
        share = 0.01 / torch.nn.utils.get_total_norm(grads)
        for p, grad in zip(e.module.parameters(), grads, strict=True):
            safe_set_full_grad(p, grad * share)

    steps(e, clip, count=1)
    steps(clipped, lambda _: None, count=1)
    assert abs(e.get_global_grad_norm() - 0.01) < 1e-4, e.get_global_grad_norm()
    for p, q in zip(weights(e), weights(clipped), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)
    for one in (e, alone, clipped):
        before, places = weights(one), {p.data_ptr() for p in one.module.parameters()}
        one.destroy()
        shared = places & {p.data_ptr() for p in one.module.parameters()}
        assert not shared if stage else len(shared) == len(places), "memory of all ranks, which goes with the engine"
        assert all(map(torch.equal, weights(one), before))
        one(torch.ones(2, 6))


deepfast.init_distributed()
for case in itertools.product((0, 1, 2), (1, 2), PRECISIONS):
    check(*case)
if dist.get_rank() == 0:
    print("seen")
