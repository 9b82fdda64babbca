"""The optimizer step: at sizes where memory decides, and at sizes where the host does.

pytest benchmarks/bench_step.py [-k "adamw and torch_fused"] [--elements 1048576]
"""

from __future__ import annotations

import functools
import gc

import measure
import peers
import pytest
import torch
from measure import BLOCK, Case, Contender
from peers import DECAY, EPS, LR, NORM, NORMS, SCALE, Params, deepspeeds, of, recipe, stepping, torchs

import deepfast
from deepfast.reference import RULES


def ours(name: str, **options: object) -> dict[str, Contender]:
    return {"deepfast": Contender(stepping(getattr(deepfast, name), **options))}


def oracle(cls: type, **options: object):
    """The optimizer itself, told to be plain: of torch its loop, of ours :mod:`deepfast.reference`."""
    plain = {"backend": "reference"} if cls.__module__.startswith("deepfast") else {"foreach": False}
    return lambda params, repeats: cls(params, lr=LR, **options, **plain).step


def whole(params: Params, **form: str) -> measure.Step:
    """Unscale, check, norm, clip, AdamW, master, 16-bit weight: ours is one optimizer and one scaler."""
    optimizer = deepfast.AdamW(params, lr=LR, weight_decay=DECAY, eps=EPS, max_grad_norm=NORM, **form)
    scaler = deepfast.LossScaler(init_scale=SCALE)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def whole_oracle(params: Params, repeats: int) -> measure.Step:
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, eps=EPS, foreach=False)

    def step() -> None:
        scaled = [p.grad for p in params]
        for p in params:
            grad = p.grad / SCALE
            p.grad = grad * min(1.0, NORM / (grad.norm().item() * repeats**0.5))
        optimizer.step()
        for p, grad in zip(params, scaled, strict=True):
            p.grad = grad

    return step


WHOLE = {
    "deepfast": Contender(whole),
    "deepfast_fp32_master": Contender(functools.partial(whole, master="fp32")),
    "deepfast_bf16_moments": Contender(functools.partial(whole, state_dtype="bf16"), peers.LOW_BITS),
    "deepfast_int8_moments": Contender(functools.partial(whole, state_dtype="int8"), peers.BY_CHANCE),
    **{
        name: recipe(contender)
        for name, contender in {
            **torchs("AdamW", weight_decay=DECAY, eps=EPS),
            "deepspeed": deepspeeds("Adam", weight_decay=DECAY, eps=EPS),
        }.items()
        if name != "torch_loop"
    },
}
LAYER = ((768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,), (3072, 768),
         (768,))  # fmt: skip
GPT2 = ((50257, 768), (1024, 768), *LAYER * 12, (768,), (768,))
ADAMW = {**ours("AdamW", weight_decay=DECAY), **torchs("AdamW", weight_decay=DECAY)}
ADAMW_ORACLE = oracle(torch.optim.AdamW, weight_decay=DECAY)
AMSGRAD = {"amsgrad": True, "weight_decay": DECAY}
HOST = {"each": RULES["adam"].moved, "oracle": ADAMW_ORACLE, "rounds": 51, "small": 1 << 20, "empty": measure.ordinary}

CASES = {
    "adamw": Case("AdamW, fp32", RULES["adam"].moved, {**ADAMW, **peers.ADAMW}, ADAMW_ORACLE),
    "adamw_ordinary_pages": Case(
        "AdamW, fp32, ordinary pages",
        RULES["adam"].moved,
        {**ADAMW, "deepspeed": peers.ADAMW["deepspeed"]},
        ADAMW_ORACLE,
        empty=measure.ordinary,
    ),
    "bf16_moments": Case(
        "AdamW, fp32, bf16 moments",
        20,
        {
            "deepfast": Contender(stepping(deepfast.AdamW, weight_decay=DECAY, state_dtype="bf16"), peers.LOW_BITS),
            "torch_fused": ADAMW["torch_fused"],
        },
        ADAMW_ORACLE,
    ),
    "int8_moments": Case(
        "AdamW, fp32, int8 moments",
        16,
        {
            "deepfast": Contender(stepping(deepfast.AdamW, weight_decay=DECAY, state_dtype="int8"), peers.BY_CHANCE),
            "torch_fused": ADAMW["torch_fused"],
        },
        ADAMW_ORACLE,
    ),
    "amsgrad": Case(
        "AdamW (amsgrad), fp32",
        RULES["adam_amsgrad"].moved,
        {**ours("AdamW", **AMSGRAD), **torchs("AdamW", **AMSGRAD)},
        oracle(torch.optim.AdamW, **AMSGRAD),
    ),
    "sgd": Case("SGD, fp32", RULES["sgd"].moved, {**ours("SGD"), **torchs("SGD")}, oracle(torch.optim.SGD)),
    "momentum": Case(
        "SGD with momentum, fp32",
        RULES["sgd_momentum"].moved,
        {
            **ours("SGD", momentum=0.9),
            **torchs("SGD", momentum=0.9),
            "optimi": of("optimi", "SGD", pip="torch-optimi", momentum=0.9, torch_init=True),
            "bitsandbytes": of("bitsandbytes.optim", "SGD", momentum=0.9),
        },
        oracle(torch.optim.SGD, momentum=0.9),
    ),
    "lion": Case(
        "Lion, fp32",
        RULES["lion"].moved,
        {
            **ours("Lion"),
            "torch_foreach": Contender(stepping(peers.ForeachLion)),
            "deepspeed": deepspeeds("Lion", betas=(0.9, 0.99)),
            "optimi": of("optimi", "Lion", pip="torch-optimi"),
            "bitsandbytes": of("bitsandbytes.optim", "Lion"),
        },
        oracle(deepfast.Lion),
        tolerance=1e-3,  # a sign that turns at another place
    ),
    "lamb": Case(
        "LAMB, fp32",
        RULES["lamb"].moved,
        {**ours("LAMB", weight_decay=DECAY), "torch_foreach": Contender(stepping(peers.ForeachLAMB), NORMS)},
        oracle(deepfast.LAMB, weight_decay=DECAY),
    ),
    "adagrad": Case(
        "Adagrad, fp32",
        RULES["adagrad"].moved,
        {
            **ours("Adagrad"),
            **torchs("Adagrad"),
            "deepspeed": deepspeeds("Adagrad"),
            "bitsandbytes": of("bitsandbytes.optim", "Adagrad"),
        },
        oracle(torch.optim.Adagrad),
    ),
    **{
        name: Case(f"full {name} AdamW step", 28, WHOLE, whole_oracle, dtype=dtype, tolerance=0.002)  # roundings turn
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
    },
    "gpt2": Case(
        "AdamW, fp32, GPT-2 124M (148 tensors)", RULES["adam"].moved, ADAMW, ADAMW_ORACLE, GPT2, empty=measure.ordinary
    ),
    "2000_of_256": Case("AdamW, fp32, 2000 tensors of 256", contenders=ADAMW, shapes=((256,),) * 2000, **HOST),
    "10000_of_4": Case("AdamW, fp32, 10,000 parameters of 4", contenders=ADAMW, shapes=((4,),) * 10_000, **HOST),
}


@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in CASES[case].contenders],
)
def test_step(benchmark, elements, case, contender):
    assert elements % BLOCK == 0
    measure.contest(benchmark, CASES[case], contender, elements)
    gc.collect()  # an optimizer's cycles hold gigabytes
