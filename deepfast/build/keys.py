"""The names of a library's folders, ``<interface>/<compiler>``: whether it can be loaded here, and who made it.

``interface`` names everything that decides whether a library can be loaded and would be right here (sources, flags,
torch and CUDA versions, architecture, the CPU's instruction set), ``compiler`` the compiler that made it (and the GPUs
it made it for).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from pathlib import Path

import torch

from deepfast.build.compilers import Compiler, compiler, nvcc
from deepfast.build.libraries import COMM, CPU, CSRC, CUDA, Library, all_flags
from deepfast.build.said import BuildError
from deepfast.build.targets import architectures, capability, instruction_set


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]


@functools.cache
def interface_key(library: Library = CPU) -> str:
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in library.suffixes)
    sources = [part for p in files for part in (str(p.relative_to(CSRC)).encode(), p.read_bytes())]
    abi = f"{torch.__version__} {torch.version.cuda} {torch.compiled_with_cxx11_abi()} {platform.machine()}"
    flags = " ".join(all_flags(library))
    if library == CUDA:
        return f"{platform.machine()}-cuda-{digest(*sources, flags, abi)}"
    if library == COMM:
        abi += f" {sys.implementation.cache_tag}"
    cpu = instruction_set()[1]
    return f"{platform.machine()}-{capability().lower()}-{digest(*sources, flags, abi, cpu, capability())}"


def compiler_key(*compilers: Compiler) -> str:
    parts = [part for c in compilers for part in (c.version, *c.command)]
    return f"{Path(compilers[0].command[-1]).name}-{digest(*parts)}"


def toolchain(library: Library) -> tuple[str, list[Compiler]]:
    """The name of a library's folder, and the compilers that make it.

    Raises:
        BuildError: if one of them is missing.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError(
            f"no C++ compiler found ({'CXX=' + os.environ['CXX'] if os.environ.get('CXX') else 'g++, c++, clang++'}): "
            "install one (Debian, Ubuntu: apt install g++) or set CXX",
            passing=True,
        )
    if library != CUDA:
        return compiler_key(cxx), [cxx]
    if torch.version.cuda is None:
        raise BuildError(f"this torch ({torch.__version__}) is built without CUDA", passing=True)
    cuda = nvcc()
    if isinstance(cuda, str):
        raise BuildError(cuda, passing=True)
    return "-".join((compiler_key(cuda, cxx), *architectures())), [cxx, cuda]
