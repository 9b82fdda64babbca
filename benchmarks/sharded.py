"""Who trains on several ranks of a CPU: our engine, DDP over gloo with torch's parts, DeepSpeed's engine.

All do the same: AdamW, clipped at a global norm, from the mean of the ranks' gradients; a 16-bit weight has an fp32
master, fp16 a static loss scale.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from measure import Step
from peers import DECAY, EPS, LR, NORM, SCALE, recipe, torchs
from ranks import BUCKET, RANKS
from torch import Tensor, nn

import deepfast

ADAMW = {"weight_decay": DECAY, "eps": EPS}


def scale(dtype: torch.dtype) -> float:
    return SCALE if dtype == torch.float16 else 1.0


@dataclasses.dataclass(frozen=True)
class Training:
    """A step of it is ``backward(forward(…)); step()``.

    Attributes:
        reduce: instead of both passes, where gradients are there already; None where only a backward pass sums them.
        kept: what this rank keeps for the optimizer's state and for the gradients' sums; None where nobody has counted.
    """

    forward: Callable[..., Tensor]
    backward: Callable[[Tensor], object]
    step: Step
    reduce: Callable[[list[Tensor]], object] | None = None
    kept: Callable[[], dict[str, list[Tensor]]] | None = None


@dataclasses.dataclass(frozen=True)
class Trainer:
    """``make`` takes a module whose weights are of the type already; ``package`` brings it; ``stage`` is ZeRO's."""

    make: Callable[[nn.Module, torch.dtype], Training]
    package: str
    stage: int = 0

    def load(self) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        importlib.import_module(self.package)


def config(dtype: torch.dtype, stage: int) -> dict[str, object]:
    """Of both engines."""
    precision = {
        torch.float16: {"fp16": {"enabled": True, "loss_scale": SCALE}},
        torch.bfloat16: {"bf16": {"enabled": True}},
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": NORM,
        "zero_optimization": {"stage": stage},
        **precision.get(dtype, {}),
    }


def ours(stage: int) -> Trainer:
    def make(module: nn.Module, dtype: torch.dtype) -> Training:
        engine, *_ = deepfast.initialize(
            model=module, optimizer=lambda params: deepfast.AdamW(params, lr=LR, **ADAMW), config=config(dtype, stage)
        )
        params = list(module.parameters())

        def reduce(grads: list[Tensor]) -> None:  # what engine.backward does around autograd
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            engine._gradients.count = 1
            engine._gradients.sums.begin(None, last=True)
            engine._gradients.sums.add()

        def kept() -> dict[str, list[Tensor]]:
            states = [t for state in engine.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
            return {"state": states, "sums": engine._gradients.sums.sums}

        return Training(engine, engine.backward, engine.step, reduce, kept)

    return Trainer(make, "deepfast", stage)


def ddp(module: nn.Module, dtype: torch.dtype) -> Training:
    wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    params = list(module.parameters())
    fused = torchs("AdamW", **ADAMW)["torch_fused"]
    update = fused.make(params) if dtype == torch.float32 else recipe(fused, scale(dtype)).make(params)

    def reduce(grads: list[Tensor]) -> None:
        """DDP's buckets without DDP: the gradients have been written into them, nothing is copied."""
        flat = grads[0]._base
        for bucket in flat.split(BUCKET // dtype.itemsize):  # all at once take as long
            dist.all_reduce(bucket)
        flat.div_(RANKS)
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def step() -> None:
        if dtype == torch.float32:
            nn.utils.clip_grad_norm_(params, NORM)
        update()
        module.zero_grad()

    return Training(wrapped, lambda loss: (loss * scale(dtype)).backward(), step, reduce)


def deepspeeds(stage: int) -> Trainer:
    def make(module: nn.Module, dtype: torch.dtype) -> Training:
        import deepspeed

        if dtype == torch.bfloat16 and stage == 0:  # measured with 0.19.8: its first update is 0.74 of Adam's
            raise NotImplementedError("bf16 at stage 0 begins with a step of zeros, and counts it")
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR, **ADAMW, fused=True)
        options = {**config(dtype, stage), "zero_allow_untested_optimizer": True}
        options["zero_optimization"] |= {"reduce_scatter": False}  # over gloo faster by a quarter
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options)
        return Training(engine, engine.backward, engine.step)

    return Trainer(make, "deepspeed", stage)


TRAINERS = {
    "deepfast_2": ours(2),
    "deepfast_1": ours(1),
    "deepfast_0": ours(0),
    "ddp": Trainer(ddp, "torch"),
    "deepspeed_2": deepspeeds(2),
    "deepspeed_1": deepspeeds(1),
    "deepspeed_0": deepspeeds(0),
}
