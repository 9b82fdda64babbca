"""What the kernels are compiled for: GPUs, and the CPU's instruction set."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from deepfast.build.said import BuildError

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"AVX2": _AVX2, "AVX512": _AVX512}
CPUINFO = Path("/proc/cpuinfo")


def capability() -> str:
    """The instruction set to compile for: torch's own choice, so ``ATEN_CPU_CAPABILITY`` holds here too."""
    return torch.backends.cpu.get_cpu_capability()


def instruction_set() -> tuple[tuple[str, ...], str]:
    """The compiler's flags for this machine's CPU, and what else their meaning depends on, for the key.

    On 64-bit Arm the compiler finds out by itself what the CPU has, from the lines that are returned here.
    """
    if platform.machine() != "aarch64" or os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        return INSTRUCTION_SETS.get(capability(), ()), ""
    said: list[str] = []
    with contextlib.suppress(OSError):
        said = re.findall(r"^(?:Features|CPU (?:implementer|variant|part))\s*:.*", CPUINFO.read_text(), re.MULTILINE)
    return ("-mcpu=native",), "\n".join(sorted(set(said)))


def architectures() -> tuple[str, ...]:
    """What to compile for: ``$TORCH_CUDA_ARCH_LIST`` ("8.0;9.0a;12.0+PTX"), else the GPUs that torch sees.

    Raises:
        BuildError: if the list cannot be read, or there is neither list nor GPU.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not listed:
        if not torch.cuda.is_available():
            raise BuildError('no GPU to compile for: set TORCH_CUDA_ARCH_LIST ("8.0;9.0")', passing=True)
        return tuple(f"sm_{gpu}" for gpu in sorted(set(gpus())))
    names = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed!r}: {entry!r} is no compute capability (like 9.0)", True)
        number = f"{match[1]}{match[2]}{match[3]}"
        names += [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]
    return tuple(dict.fromkeys(names))


def gpus() -> list[int]:
    """The compute capabilities of the GPUs that torch sees, 90 for 9.0."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))]


def covered(names: Iterable[str], gpu: int) -> bool:
    """Whether code for ``names`` (sm_90, sm_90a, compute_90) runs on a GPU of compute capability ``gpu``."""
    for name in names:
        kind, _, number = name.partition("_")
        wanted = int(re.sub(r"\D", "", number))
        exact = number[-1:].isalpha()
        if wanted == gpu or (not exact and wanted < gpu and (kind == "compute" or wanted // 10 == gpu // 10)):
            return True
    return False


def check_covered(names: tuple[str, ...]) -> None:
    """Raises BuildError if torch sees a GPU that code for ``names`` does not run on."""
    for gpu in gpus():
        if not covered(names, gpu):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST')!r} leaves out the GPU that is here "
                f"({gpu // 10}.{gpu % 10}): add it, or unset the variable",
                passing=True,
            )


def arch_flags(names: tuple[str, ...]) -> list[str]:
    """nvcc's flags for machine code (sm_90) and, where asked for, PTX (compute_90)."""
    return [flag for name in names for flag in ("-gencode", f"arch={name.replace('sm_', 'compute_')},code={name}")]
