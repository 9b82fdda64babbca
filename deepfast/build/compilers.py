"""The compilers that are here, and how many may run at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import torch

from deepfast.build.said import BuildError

OLDEST_NVCC = (12, 1)  # kernels with more than 4 KiB of parameters


@dataclasses.dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str

    @property
    def program(self) -> str:
        """The compiler itself, of a command like `ccache g++ -m64`."""
        return next(word for word in reversed(self.command) if not word.startswith("-"))

    def __str__(self) -> str:
        return f"{Path(self.program).name} {self.version}"


@functools.cache
def compiler() -> Compiler | None:
    """The C++ compiler: ``$CXX``, else g++, c++ or clang++ on the path; None if there is none that runs."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "c++", "clang++"]:
        command = tuple(shlex.split(candidate))
        if command and shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                version = subprocess.run(
                    [*command, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=True
                )
                return Compiler(command, version.stdout.strip())
    return None


@functools.cache
def nvcc() -> Compiler | str:
    """CUDA's compiler, or why there is none that fits torch.

    Looked for in ``$CUDA_HOME``, on the path, in ``/usr/local/cuda`` and in NVIDIA's Python packages.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packages = [Path(p) / "nvidia" for p in (*site.getsitepackages(), site.getusersitepackages(), *sys.path)]
    candidates = [
        *([Path(named) / "bin/nvcc"] if named else []),
        *map(Path, filter(None, [shutil.which("nvcc")])),
        Path("/usr/local/cuda/bin/nvcc"),
        *(path for folder in packages for path in (folder / "cu13/bin/nvcc", folder / "cuda_nvcc/bin/nvcc")),
    ]
    unfit = []
    for path in filter(Path.is_file, candidates):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release (\d+)\.(\d+)", said)
            if release is None:
                continue
            version = int(release[1]), int(release[2])
            wanted = torch.version.cuda
            if version >= OLDEST_NVCC and (wanted is None or wanted.split(".")[0] == release[1]):
                return Compiler((str(path),), f"{version[0]}.{version[1]}")
            unfit.append(f"{path} is of CUDA {version[0]}.{version[1]}")
    needed = f"CUDA {torch.version.cuda.split('.')[0]}" if torch.version.cuda else "CUDA"
    return (
        f"no nvcc of {needed} found, 12.1 or later"
        + (f" ({'; '.join(unfit)})" if unfit else "")
        + ": install the CUDA toolkit, or set CUDA_HOME to where it is"
    )


def max_jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isdigit() and int(value) > 0):
        raise BuildError(f"MAX_JOBS={value!r} is not a positive number", passing=True)
    return int(value) if value else len(os.sched_getaffinity(0))
