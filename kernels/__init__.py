"""The kernels in Triton: the twin of ``csrc``, formula by formula, for GPUs on a machine without a CUDA compiler.

``from deepfast.kernels import backend`` gives a backend: the functions and the ``Plan`` of :mod:`deepfast.reference`.
Importing this package imports no Triton; :func:`available` says whether there is one that can be used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

import torch

OLDEST = (3, 6)


def available() -> str | None:
    """None where the kernels can run, else why not. With TRITON_INTERPRET=1 they run on CPU tensors, slowly."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton {version} is too old: {'.'.join(map(str, OLDEST))} is the first that will do"
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or torch.cuda.is_available():
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 runs the Triton kernels on a CPU, slowly)"
