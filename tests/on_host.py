"""The CUDA kernels compiled for the host: the backend that tests play, and programs of their own under sanitizers.

tests/cuda_on_host says how. The programs run on a GPU as well: :func:`gpu_program` compiles the same files with nvcc.
Nothing here needs pytest: whoever rehearses without a GPU compiles them, too. What a function has made in a folder it
finds there the next time, unless a source has changed since; any number of processes may share a folder.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock

from deepfast import build

TESTS = Path(__file__).resolve().parent
SHIM = TESTS / "cuda_on_host"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# -g1: reports say where. -O1: beyond it, sanitized code takes longer to compile than it saves.
SANITIZED = ("-O1", "-g1", *SANITIZERS)
FLAGS = ("-std=c++20", "-fopenmp", "-ffp-contract=off", "-w", "-I", str(SHIM), "-x", "c++", "-c")
# Of csrc, what tests/<name>.cu runs.
PROGRAMS = {
    "harness": (*(name for name in build.CUDA.kernels if "collectives" not in name), *build.CPU.kernels),
    "ranks": ("cuda/collectives.cu", "cpu/statistics.cpp"),
}


def backend(folder: Path) -> Path:
    """The CUDA backend for CPU tensors, to be loaded by :func:`played_cuda`."""
    cxx, root = _cxx(), Path(torch.__file__).parent
    sources = [*(build.CSRC / name for name in build.CUDA.kernels), SHIM / "threads.cpp"]
    commands = {_object(path): [*cxx, "-O2", "-fPIC", *FLAGS, path] for path in sources}
    binding = SHIM / "ops.cpp"
    commands[_object(binding)] = [*cxx, "-O1", "-fPIC", *FLAGS, binding, "-isystem", root / "include"]
    link = [*cxx, "-shared", "-fopenmp"]
    return _made(folder / "backend" / "on_host.so", commands, link, [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"])


def played_cuda(made: Path) -> SimpleNamespace:
    """The backend that :func:`backend` has made."""
    torch.ops.load_library(made)
    names = ("statistics", "decide_", "step_", "accumulate_", "scaler_update_", "collective_", "peer_layout",
             "launches", "capture")  # fmt: skip
    operators = {name: getattr(torch.ops.deepfast_cuda_on_host, name) for name in names}
    return SimpleNamespace(Plan=torch.classes.deepfast_cuda_on_host.Plan, **operators)


def program(folder: Path, name: str) -> Path:
    """One of ``PROGRAMS``, with sanitizers."""
    sources = [*(build.CSRC / source for source in PROGRAMS[name]), TESTS / f"{name}.cu", SHIM / "threads.cpp"]
    commands = {_object(path): [*_cxx(), *SANITIZED, *FLAGS, path] for path in sources}
    return _made(folder / name / name, commands, [*_cxx(), "-fopenmp", *SANITIZERS])


def variant(made: Path, source: Path, folder: Path) -> Path:
    """What :func:`program` has made with another version of a source, whose name and folder's name are the same."""
    changed = _object(source)
    others = [path for path in made.parent.glob("*.o") if path.name != changed]
    if not (made.parent / changed).exists():
        raise ValueError(f"{made.name} holds no {changed}")
    _run([*_cxx(), *SANITIZED, *FLAGS, source, "-o", folder / changed])
    _run([*_cxx(), "-fopenmp", *SANITIZERS, folder / changed, *others, "-o", folder / made.name])
    return folder / made.name


def gpu_program(folder: Path, name: str, architectures: Sequence[str]) -> Path:
    """One of ``PROGRAMS`` for GPUs ("sm_90"; "compute_90": PTX), with the flags that the kernels are built with."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    nvcc = build.nvcc()
    if isinstance(nvcc, str):
        raise RuntimeError(nvcc)
    device = [*nvcc.command, *COMMON_NVCC_FLAGS, *build.nvcc_flags(build.compiler().program, tuple(architectures))]
    kernel = {".cu": device, ".cpp": [*_cxx(), *build.cxx_flags(build.CPU)]}
    commands = {_object(path): [*kernel[path.suffix], "-c", path] for path in map(build.CSRC.joinpath, PROGRAMS[name])}
    own, link = TESTS / f"{name}.cu", [*device, "-cudart", "static", "-Xcompiler", "-fopenmp"]
    # What is expected is computed on the host: no multiply-add there that is not written as one.
    commands[_object(own)] = [*link, "-Xcompiler", "-ffp-contract=off", "-c", own]
    return _made(folder / f"gpu_{name}" / name, commands, link)


def _cxx() -> tuple[str, ...]:
    found = build.compiler()
    if found is None:
        raise RuntimeError("no C++ compiler found")
    return found.command


def _object(source: Path) -> str:
    return f"{source.parent.name}_{source.stem}.o"  # cpu and cuda have sources of the same name


def _made(out: Path, commands: Mapping[str, Sequence], link: Sequence, libraries: Sequence = ()) -> Path:
    """Compiles the objects and links them into ``out``, unless that has been done."""
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not out.exists() or out.stat().st_mtime < _last_change():
            with ThreadPoolExecutor(build.max_jobs()) as pool:
                list(pool.map(_run, [[*command, "-o", folder / name] for name, command in commands.items()]))
            _run([*link, *(folder / name for name in commands), *libraries, "-o", out])
    return out


def _last_change() -> float:
    sources = *build.CSRC.rglob("*.*"), *SHIM.iterdir(), *TESTS.glob("*.cu"), *TESTS.glob("*.h")
    return max(path.stat().st_mtime for path in sources)


def _run(command: Sequence) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-5000:]}")
