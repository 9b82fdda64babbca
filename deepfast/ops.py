"""Which code runs: finds or compiles the kernels and hands out backends.

A backend is an object with the functions of :mod:`deepfast.reference` and its ``Plan``: ``native`` for the CPU
kernels, what ``cuda()`` and ``triton()`` give for a GPU's, :mod:`deepfast.reference` itself where there are none. The
CPU kernels are loaded (or compiled) when this module is imported, the others when they are first needed.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import library

from deepfast import build, reference
from deepfast.errors import BackendError, ConfigError

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_OPERATORS = ("statistics", "decide_", "step_", "accumulate_", "scaler_update_")
_ON_A_GPU = (*_OPERATORS, "collective_", "peer_layout")

LIBRARY: Path | None = None
native: Any = None
"""The compiled operators (``torch.ops.deepfast``) and ``Plan`` (``torch.classes.deepfast``), if there are any."""
BUILD_ERROR: str | None = None
"""Why there are no compiled kernels, if there are none."""

try:
    LIBRARY = build.load()
except build.BuildError as _error:
    BUILD_ERROR = str(_error)
    warnings.warn(
        f"deepfast runs without compiled kernels, slower by an order of magnitude: {BUILD_ERROR}",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    # In-place operators return nothing: under a fake tensor there is nothing to compute.
    for _name in ("decide_", "step_", "accumulate_", "scaler_update_"):
        library.register_fake(f"deepfast::{_name}", lambda *args, **kwargs: None)
    library.register_fake("deepfast::statistics", lambda grads: grads[0].new_empty(2, dtype=torch.float64))
    native = types.SimpleNamespace(
        Plan=torch.classes.deepfast.Plan, **{name: getattr(torch.ops.deepfast, name) for name in _OPERATORS}
    )


@functools.cache
def cuda() -> Any:
    """The compiled CUDA kernels; where they are not to be had, a string that says why."""
    if BUILD_ERROR is not None:
        return BUILD_ERROR
    try:
        build.load(build.CUDA)
    except build.BuildError as error:
        if not error.passing:  # nvcc is here, and did not do it
            warnings.warn(f"deepfast runs without compiled CUDA kernels: {error}", RuntimeWarning, stacklevel=6)
        return str(error)
    return types.SimpleNamespace(
        Plan=torch.classes.deepfast.CudaPlan, **{name: getattr(torch.ops.deepfast, name) for name in _ON_A_GPU}
    )


@functools.cache
def triton() -> Any:
    """The Triton kernels; where they are not to be had, a string that says why."""
    from deepfast.kernels import available

    why_not = available()
    if why_not is not None:
        return why_not
    return importlib.import_module("deepfast.kernels.backend")


def forced(backend: str = "auto") -> str:
    """``backend``, or where that is "auto" what ``$DEEPFAST_BACKEND`` says. Raises ConfigError for an unknown one."""
    chosen = (os.environ.get("DEEPFAST_BACKEND") or "auto") if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise ConfigError(f"deepfast: unknown backend {chosen!r}: choose one of {', '.join(BACKENDS)}")
    return chosen


@functools.cache
def _warn_reference(device: str, why: str) -> None:
    warnings.warn(
        f"deepfast runs without kernels for {device}, slower by an order of magnitude: {why}",
        RuntimeWarning,
        stacklevel=5,
    )


def _named(backend: str, device: torch.device) -> Any:
    """The backend called so, for tensors on ``device``; where it is not to be had, a string that says why."""
    if backend == "cpu" and device.type == "cpu":
        return native if BUILD_ERROR is None else BUILD_ERROR
    if backend == "cuda" and device.type == "cuda":
        return cuda()
    if backend == "triton" and (device.type == "cuda" or _interpreted()):
        return triton()
    return f"the parameter lies on {device}"


def _interpreted() -> bool:
    """Whether Triton runs on the host, one element after the other (for tests)."""
    return build.flag("TRITON_INTERPRET")


def select(backend: str, device: torch.device, *dtypes: torch.dtype) -> Any:
    """The backend for tensors of these dtypes on ``device``.

    Args:
        backend: one of ``BACKENDS``, already resolved by :func:`forced`. "auto" on a CPU is the compiled kernels, on a
            GPU the compiled ones or else Triton's; where there are none, the reference.

    Raises:
        BackendError: if a backend was asked for by name and is not to be had.
    """
    if backend == "reference":
        return reference
    known = KERNEL_DTYPES.issuperset(dtypes)
    if backend != "auto":
        found = _named(backend, device)
        if isinstance(found, str):
            raise BackendError(f"deepfast: backend={backend!r} was asked for, but {found}")
        return found if known else reference
    if not known:
        return reference
    names = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ())
    reasons = []
    for name in names:
        found = _named(name, device)
        if not isinstance(found, str):
            return found
        reasons.append(f"{name}: {found}")
    if device.type not in ("cpu", "meta"):  # of the CPU's, the import has warned; on meta nothing is slow
        _warn_reference(device.type, "; ".join(reasons) or "none are written")
    return reference
