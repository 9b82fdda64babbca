"""Builds what a machine with a GPU, but without a compiler or a network, takes along: `make gpu-carry`.

    python tools/gpu_carry.py [--architectures 9.0] [--programs]

to be run with the Python version and the torch of that machine (a CUDA build; no GPU is needed here). It fills

    deepfast/prebuilt   the CPU's kernels for AVX2 and AVX-512, the communication, the CUDA kernels
    .gpu                tests/harness.cu and tests/ranks.cu as programs; wheels of packages that may be missing there

both unknown to git; with them and a checkout, `tools/gpu.py` needs nothing else. --programs: only those, for the GPUs
that are here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRIED, PREBUILT = ROOT / ".gpu", ROOT / "deepfast/prebuilt"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# What is imported beside torch and pytest, and is not on every machine that has those.
PACKAGES = ("pydantic", "safetensors", "numpy", "expecttest", "ninja")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIBRARIES = "from deepfast import build as b; [b.build(b.PREBUILT, library) for library in (%s)]"


def run(*command: object, **env: str) -> None:
    done = subprocess.run([str(c) for c in command], env={**os.environ, **env}, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"make gpu-carry: {Path(str(command[0])).name} failed with exit code {done.returncode}")


def programs(architectures: tuple[str, ...]) -> None:
    import on_host

    shutil.rmtree(CARRIED, ignore_errors=True)
    for name in on_host.PROGRAMS:
        made = on_host.gpu_program(CARRIED, name, architectures)
        for other in made.parent.iterdir():
            if other != made:
                other.unlink()
        print(f"{made.relative_to(ROOT)}: {made.stat().st_size >> 10} KiB", flush=True)


def libraries(architectures: str) -> None:
    shutil.rmtree(PREBUILT, ignore_errors=True)
    path = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TORCH_CUDA_ARCH_LIST": architectures}
    for instructions in ("avx2", "avx512"):
        run(sys.executable, "-c", LIBRARIES % "b.CPU, b.COMM", ATEN_CPU_CAPABILITY=instructions, **path)
    run(sys.executable, "-c", LIBRARIES % "b.CUDA,", **path)
    for lock in PREBUILT.glob("*.lock"):
        lock.unlink()


def wheels() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    run(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version", version,
        "--implementation", "cp", *platforms, "--dest", CARRIED, *PACKAGES)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="9.0", metavar="LIST", help="as in TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--programs", action="store_true")
    chosen = parser.parse_args()
    from deepfast import build

    if chosen.programs:
        programs(build.architectures())
        return 0
    import torch

    if torch.version.cuda is None:
        print(f"make gpu-carry: torch {torch.__version__} has no CUDA: run it with that of the machine with the GPU",
              file=sys.stderr)  # fmt: skip
        return 2
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen.architectures
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # the programs' own kernels: that machine may have no more
    libraries(chosen.architectures)
    programs(build.architectures())
    wheels()
    size = sum(f.stat().st_size for folder in (CARRIED, PREBUILT) for f in folder.rglob("*") if f.is_file())
    print(f".gpu and deepfast/prebuilt: {size / 2**20:.1f} MiB, for Python {sys.version.split()[0]}, torch "
          f"{torch.__version__} and {', '.join(build.architectures())}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
