"""Compiles the kernels on first use and keeps them; finds them again in milliseconds.

There are three libraries: the CPU kernels, the CUDA kernels where torch has CUDA and nvcc is to be had, and the
communication between ranks, a Python extension module that is made when it is first needed.

They read from the bottom up: said.py (errors), compilers.py and targets.py (what is here), libraries.py (the one
description of the three), keys.py (their names), cache.py (where they are kept), machinery.py (torch's compilation),
making.py (once, whatever happens). setup.py compiles ahead from the same description.
"""

# ruff: noqa: F401 (what others use)

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import torch

from deepfast.build.cache import PREBUILT, cache_dir, find, fits, seal
from deepfast.build.compilers import Compiler, compiler, max_jobs, nvcc
from deepfast.build.keys import compiler_key, interface_key, toolchain
from deepfast.build.libraries import (
    COMM,
    COMMON_FLAGS,
    CPU,
    CSRC,
    CUDA,
    CUDA_FLAGS,
    KERNEL_FLAGS,
    Library,
    cxx_flags,
    link_flags,
    nvcc_flags,
    wanted,
)
from deepfast.build.making import build, build_all, locate, remembered
from deepfast.build.said import BuildError, flag, say
from deepfast.build.targets import INSTRUCTION_SETS, arch_flags, architectures, capability, check_covered


def load(library: Library = CPU) -> Path:
    """Finds or builds ``library`` and registers its operators as ``torch.ops.deepfast``.

    Raises:
        BuildError: if there is no library and none can be built.
    """
    path = locate(library)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _unloadable(path, error) from error
    return path


@functools.cache
def load_comm() -> Any:
    """Finds or builds the communication between ranks and imports it.

    Raises:
        BuildError: if there is none and none can be built.
    """
    path = locate(COMM)
    loader = importlib.machinery.ExtensionFileLoader("deepfast_comm", str(path))
    try:
        module = importlib.util.module_from_spec(
            importlib.machinery.ModuleSpec("deepfast_comm", loader, origin=str(path))
        )
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise _unloadable(path, error) from error
    return module


def _unloadable(path: Path, error: Exception) -> BuildError:
    return BuildError(f"{path} cannot be loaded: {error}; delete {path.parent} to compile it again")
