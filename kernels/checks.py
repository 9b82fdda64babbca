"""What the kernels ask of their tensors, in the words of ``csrc/bindings``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepfast.reference import GROUPED, packed_size

from .table import DTYPES


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"deepfast: {message}")


def type_name(t: Tensor) -> str:
    """What torch's C++ calls the dtype: Half, Int, …"""
    return t.type().rpartition(".")[2].removesuffix("Tensor")


def check_dtype(t: Tensor, what: str) -> torch.dtype:
    require(
        t.dtype in DTYPES,
        f"{what} has dtype {type_name(t)}; the kernels take float32, float16 and bfloat16 "
        '(others run on backend="reference")',
    )
    return t.dtype


def check_master(t: Tensor, param: torch.dtype) -> torch.dtype:
    """fp32, or of a 16-bit parameter what it lacks of that (``csrc/codec/split.h``)."""
    split = t.dtype == torch.int16 and param != torch.float32
    require(split or t.dtype == torch.float32, f"a master has dtype {type_name(t)}")
    return t.dtype


def check_moment(t: Tensor) -> torch.dtype:
    """Any of the kernels' types, or (int8, uint8) in groups of 8 bits (``csrc/codec/int8.h``)."""
    return t.dtype if t.dtype in GROUPED else check_dtype(t, "a moment")


def check_grouped(t: Tensor, numel: int, device: torch.device) -> None:
    """A moment in groups, of a parameter of ``numel`` elements."""
    require(
        t.dim() == 1 and t.numel() == packed_size(numel) and t.is_contiguous(),
        f"a moment in 8 bits of {numel} elements must be {packed_size(numel)} contiguous bytes, "
        f"got shape {list(t.shape)}",
    )
    check_device(t, device, "a moment")
    require(t.data_ptr() % 4 == 0, "a moment in 8 bits must begin at a boundary of 4 bytes")


def check_count(tensors: Sequence[object], count: int, what: str) -> None:
    require(len(tensors) == count, f"{count} tensors of {what} expected, got {len(tensors)}")


def check_device(t: Tensor, device: torch.device, what: str) -> None:
    require(t.device == device, f"{what} lies on {t.device}, not on {device}")


def check_values(t: Tensor, numel: int, what: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    require(
        t.dtype == dtype and t.numel() == numel and t.is_contiguous(),
        f"{what} must be {numel} contiguous {str(dtype).removeprefix('torch.')} values, "
        f"got {t.numel()} of {type_name(t)}",
    )
    check_device(t, device, what)


def check_question(grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device) -> None:
    if grad_scale is not None:
        check_values(grad_scale, 1, "grad_scale", device)
    if found_inf is not None:
        check_values(found_inf, 1, "found_inf", device)


def is_plain(t: Tensor, device: torch.device) -> bool:
    """Whether the memory at ``t.data_ptr()`` says what ``t`` holds."""
    ordinary = type(t) in (Tensor, torch.nn.Parameter) or not is_traceable_wrapper_subclass(t)
    return ordinary and t.layout == torch.strided and t.device == device and t.dtype in DTYPES and not t.is_neg()


def written(tensors: Sequence[Tensor]) -> None:
    """Autograd must know what was written behind its back: a graph that still needs the old values has to refuse."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
