"""Which code runs: finds or compiles the kernels on import and hands out backends.

A backend is an object with the functions of :mod:`deepfast.reference` and its ``Plan``: ``native`` for the compiled
kernels, :mod:`deepfast.reference` itself where there are none.
"""

from __future__ import annotations

import functools
import os
import types
import warnings
from pathlib import Path
from typing import Any

import torch

from deepfast import build, reference
from deepfast.errors import ConfigError

BACKENDS = ("auto", "cpu", "reference")
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))

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
        torch.library.register_fake(f"deepfast::{_name}", lambda *args, **kwargs: None)
    torch.library.register_fake("deepfast::statistics", lambda grads: torch.empty(2, dtype=torch.float64))
    _OPERATORS = ("statistics", "decide_", "step_", "accumulate_", "scaler_update_")
    native = types.SimpleNamespace(
        Plan=torch.classes.deepfast.Plan, **{name: getattr(torch.ops.deepfast, name) for name in _OPERATORS}
    )


def forced(backend: str = "auto") -> str:
    """``backend``, or where that is "auto" what ``$DEEPFAST_BACKEND`` says. Raises ConfigError for an unknown one."""
    chosen = os.environ.get("DEEPFAST_BACKEND", "auto") if backend == "auto" else backend
    if chosen in ("cuda", "triton"):
        raise ConfigError(f"deepfast: backend {chosen!r} is not built yet: choose one of {', '.join(BACKENDS)}")
    if chosen not in BACKENDS:
        raise ConfigError(f"deepfast: unknown backend {chosen!r}: choose one of {', '.join(BACKENDS)}")
    return chosen


@functools.cache
def _warn_reference(device: str) -> None:
    warnings.warn(
        f"deepfast has no {device} kernels yet: the reference runs instead, slower and with the same result",
        RuntimeWarning,
        stacklevel=4,
    )


def select(backend: str, device: torch.device, *dtypes: torch.dtype) -> Any:
    """The backend for tensors of these dtypes on ``device``.

    Args:
        backend: one of ``BACKENDS``, already resolved by :func:`forced`.

    Raises:
        RuntimeError: if a backend was asked for by name and is not to be had.
    """
    if backend == "reference":
        return reference
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"deepfast: backend='cpu' was asked for a parameter on {device}")
        if LIBRARY is None:
            raise RuntimeError(f"deepfast: backend='cpu' was asked for, but {BUILD_ERROR}")
    if device.type != "cpu":
        _warn_reference(device.type)
    if device.type == "cpu" and LIBRARY is not None and KERNEL_DTYPES.issuperset(dtypes):
        return native
    return reference
