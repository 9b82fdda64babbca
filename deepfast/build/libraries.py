"""The three libraries: what each is made of, and with which flags. For the first use, setup.py and the tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from deepfast.build.targets import arch_flags, instruction_set

_PACKAGE = Path(__file__).resolve().parents[1]
CSRC = next((p for p in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if p.is_dir()), _PACKAGE / "csrc")


@dataclasses.dataclass(frozen=True)
class Library:
    kind: str
    kernels: tuple[str, ...]  # torch-free
    bindings: tuple[str, ...]
    suffixes: tuple[str, ...]  # of what it is made from
    links: tuple[str, ...] = ()  # beside torch's libraries of operators

    @property
    def file(self) -> str:
        return f"libdeepfast_{self.kind.lower()}.so"

    @property
    def sources(self) -> tuple[str, ...]:
        """The longest to compile first."""
        return (*self.bindings, *self.kernels)


CPU = Library(
    "CPU",
    ("cpu/step.cpp", "cpu/statistics.cpp", "cpu/accumulate.cpp", "cpu/refresh.cpp"),
    ("bindings/ops.cpp",),
    (".h", ".cpp"),
)
CUDA = Library(
    "CUDA",
    (
        "cuda/step.cu",
        "cuda/collectives.cu",
        "cuda/statistics.cu",
        "cuda/accumulate.cu",
        "cuda/refresh.cu",
        "cuda/scaler.cu",
        "cuda/table.cu",
    ),
    ("bindings/cuda_ops.cpp",),
    (".h", ".cpp", ".cu", ".cuh"),
)
COMM = Library(
    "Comm",
    ("cpu/collectives.cpp", "cpu/owners.cpp", "cpu/peers.cpp", "cpu/statistics.cpp"),
    ("bindings/comm.cpp",),
    (".h", ".cpp"),
    ("-ltorch_python",),
)

# These come after torch's own (-fPIC, the includes, for nvcc -D__CUDA_NO_HALF_OPERATORS__ and the like), and so hold.
COMMON_FLAGS = ("-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall")
# -ffp-contract=off: a multiply-add is fused where the source says fma, nowhere else (bitwise agreement).
# -fno-math-errno -fno-trapping-math: let sqrt and comparisons be vectorized; they change no result.
KERNEL_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
BINDING_FLAGS = ("-O1",)  # after the kernels': no loops there, and its includes are most of the build time
# -fmad=false: as -ffp-contract=off. Division and square root are the IEEE ones, denormals are kept: nvcc's default.
CUDA_FLAGS = ("-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden,-Wall")
# torch's libgomp and the system's carry the same soname: whichever is loaded first serves both, with one pool.
# Some compilers link their own C++ library in. What comes out of an archive is kept from the other libraries of the
# process: ours and torch's would else share a few symbols, and messages lose their numbers or end the process.
LINK_FLAGS = ("-fopenmp", "-Wl,--exclude-libs,ALL")


def wanted() -> tuple[Library, ...]:
    """What is made ahead: a torch without CUDA has no use for its kernels."""
    return (CPU, COMM, CUDA) if torch.version.cuda else (CPU, COMM)


def cxx_flags(library: Library) -> tuple[str, ...]:
    """For all C++ sources of ``library``, beside torch's; bindings get ``BINDING_FLAGS`` as well."""
    return COMMON_FLAGS if library == CUDA else (*COMMON_FLAGS, *KERNEL_FLAGS, *instruction_set()[0])


def nvcc_flags(host: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """For the CUDA sources, beside torch's: with ``host`` as the compiler of the host's part, for ``names`` (sm_90)."""
    return ("-ccbin", host, *CUDA_FLAGS, *arch_flags(names))


def link_flags(library: Library) -> tuple[str, ...]:
    return (*LINK_FLAGS, *library.links)


def all_flags(library: Library) -> tuple[str, ...]:
    """What a library is made with, but for torch's own flags and what its compilers are told about the machine."""
    return (*cxx_flags(library), *BINDING_FLAGS, *link_flags(library), *(CUDA_FLAGS if library == CUDA else ()))
