"""What the checks that comm_ranks.py runs share: who is here, everybody's tensors, and what counts as the same."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

from deepfast import ops

SIZE, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
EXACT = True  # set by comm_ranks.py: whether statistics are the same to the last bit
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
DTYPES = (*FLOATS, torch.float64, torch.int32, torch.int64)


def everybodys(shape, dtype, seed=0):
    """The tensors of all ranks, the same on each."""
    g = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [torch.randint(info.min, info.max, (shape,), generator=g, dtype=dtype) for _ in range(SIZE)]
    return [(torch.randn(shape, generator=g, dtype=torch.float64) * 10).to(dtype) for _ in range(SIZE)]


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    if a.dtype.is_floating_point:
        assert torch.equal(a.isnan(), b.isnan())
        a, b = (torch.where(t.isnan(), 0.0, t).to(t.dtype) for t in (a, b))
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_on_all_ranks(t):
    everyone = [torch.empty_like(t) for _ in range(SIZE)]
    dist.all_gather(everyone, t)
    for other in everyone:
        same_bits(t, other)


def same_statistics(statistics, t):
    want = ops.native.statistics([t])
    if EXACT:
        same_bits(statistics, want)
    else:
        torch.testing.assert_close(statistics, want, rtol=1e-6, atol=0, equal_nan=True)


def mapped(address):
    """Whether the address lies in memory of ours that all ranks map."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(x, 16) for x in span.split("-"))
        if begin <= address < end:
            return "memfd:deepfast" in name
    return False


@contextlib.contextmanager
def host(name):
    os.environ["DEEPFAST_HOST_ID"] = name
    try:
        yield
    finally:
        del os.environ["DEEPFAST_HOST_ID"]
