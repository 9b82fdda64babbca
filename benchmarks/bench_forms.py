"""How much of a host's memory a training step of GPT-2 124M needs, whatever form its masters and moments are kept in.

pytest benchmarks/bench_forms.py

Each measurement has a process of its own; what counts is its peak in the second step, beyond what it had before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import measure
import pytest
import torch
from footprint import SELF, mib
from peers import EPS, LR, of, recipe, torchs
from torch import nn

import deepfast

TOKENS = 128
BF16, FP32 = torch.bfloat16, torch.float32
Make = Callable[[list[nn.Parameter]], Callable[[], object]]


def ours(**form: Any) -> Make:
    return lambda params: deepfast.AdamW(params, lr=LR, eps=EPS, **form).step


def released(**form: Any) -> Make:
    def make(params: list[nn.Parameter]) -> Callable[[], object]:
        optimizer = deepfast.AdamW(params, lr=LR, eps=EPS, **form)
        deepfast.step_in_backward(optimizer)
        return optimizer.step

    return make


# The weights' type, and who steps them.
CONTENDERS: dict[str, tuple[torch.dtype, Make]] = {
    "deepfast": (BF16, ours()),
    "deepfast_fp32_master": (BF16, ours(master="fp32")),
    "deepfast_bf16_moments": (BF16, ours(state_dtype="bf16")),
    "deepfast_bf16_moments_in_backward": (BF16, released(state_dtype="bf16")),
    "deepfast_int8_moments": (BF16, ours(state_dtype="int8")),
    "deepfast_int8_moments_in_backward": (BF16, released(state_dtype="int8")),
    "deepfast_stochastic_rounding": (BF16, ours(master="none", rounding="stochastic")),
    "torch_parts": (BF16, recipe(torchs("AdamW", eps=EPS)["torch_fused"]).make),
    "torch_fused_no_master": (BF16, torchs("AdamW", eps=EPS)["torch_fused"].make),
    "torchao_8bit_no_master": (BF16, of("torchao.optim", "AdamW8bit", bf16_stochastic_round=True).make),
    "bitsandbytes_8bit_no_master": (BF16, of("bitsandbytes.optim", "AdamW8bit").make),
    "deepfast_fp32": (FP32, ours()),
    "deepfast_fp32_bf16_moments": (FP32, ours(state_dtype="bf16")),
    "deepfast_fp32_int8_moments": (FP32, ours(state_dtype="int8")),
    "torch_fused_fp32": (FP32, torchs("AdamW", eps=EPS)["torch_fused"].make),
}


def step(name: str) -> tuple[float, float]:
    """MiB, and the seconds of forward, backward and step."""
    import transformers

    torch.set_num_threads(2)
    dtype, make = CONTENDERS[name]
    before = mib("status", "VmRSS")
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype)
    params = list(module.parameters())
    update = make(params)
    ids = torch.randint(module.config.vocab_size, (1, TOKENS))

    def once() -> None:
        module(input_ids=ids, labels=ids).loss.backward()
        update()
        for p in params:
            p.grad = None

    once()
    (SELF / "clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    once()
    return mib("status", "VmHWM") - before, time.perf_counter() - start


@pytest.mark.benchmark(timer=measure.told)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_memory(benchmark, contender):
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        try:
            peak, seconds = fresh.submit(step, contender).result()
        except (ImportError, NotImplementedError) as problem:
            measure.absent(contender.partition("_")[0], problem)
    benchmark.group = "peak memory, GPT-2 124M"
    benchmark.pedantic(lambda: measure.tell(seconds), rounds=1)
    benchmark.extra_info.update(peak_mib=peak)
