"""What collectives of tensors on a GPU take, and what they tell of a result."""

from __future__ import annotations

import torch
from torch import Tensor

from deepfast import ops

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


def nothing(statistics: Tensor | None) -> None:
    if statistics is not None:
        statistics.zero_()


def tell(t: Tensor, failed: Tensor | None, statistics: Tensor | None, found_inf: Tensor | None) -> None:
    """The statistics of a result, and whether it is finite. failed: not 0 where it is none: the step is skipped."""
    if statistics is not None:
        check_measured(t)
        statistics.copy_(ops.select(ops.forced(), t.device, t.dtype).statistics([t]))
        if failed is not None:
            statistics[1] = torch.maximum(statistics[1], failed.to(statistics.dtype))
    if found_inf is not None and t.dtype.is_floating_point:
        _note(found_inf, t)
        if failed is not None:
            found_inf.copy_(torch.maximum(found_inf, failed.to(found_inf.dtype)))


def _note(found_inf: Tensor, t: Tensor) -> None:
    found_inf.copy_(torch.maximum(found_inf, (~t.isfinite()).any().to(found_inf.dtype)))


def check_measured(t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"deepfast: statistics are of float32, float16 and bfloat16, not of {t.dtype}")


def check_summed(t: Tensor, factor: float) -> None:
    if t.layout != torch.strided or t.dtype not in (*FLOATS, torch.float64, torch.int32, torch.int64):
        raise TypeError(
            "deepfast: collectives take dense float32, float16, bfloat16, float64, int32 and int64, not "
            f"{t.layout} {t.dtype}"
        )
    if factor != 1.0 and not t.dtype.is_floating_point:
        raise TypeError("deepfast: integers are summed, not scaled or averaged")


def check_pair(whole: Tensor, part: Tensor, ranks: int, what: str) -> None:
    if whole.numel() != ranks * part.numel():
        raise RuntimeError(
            f"deepfast: {what}: one tensor must have {ranks} times the other's elements, got {whole.numel()} and "
            f"{part.numel()}"
        )
    if whole.dtype != part.dtype and not (whole.dtype in FLOATS and part.dtype in FLOATS):
        raise TypeError(f"deepfast: {what} cannot turn {whole.dtype} into {part.dtype}")
