"""Triton without a GPU: its own compiler and launcher, on CPU tensors and a driver that only says yes (libcuda.c).

What it shows: that kernels compile as they are called (the types, constants and alignments of the call, which
ahead-of-time compiles have to guess), how often they are launched, that nothing is compiled anew, and that the host's
side of a launch goes through, for an H100. What it does not show is anything about the kernels' work: none is done, and
what they should have written is what was there before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock

HERE = Path(__file__).resolve().parent
CAPABILITY = (9, 0)


@dataclasses.dataclass
class Played:
    """What Triton has done since :func:`play`, by kernel."""

    driver: ctypes.CDLL
    variants: Counter[str] = dataclasses.field(default_factory=Counter)
    """How many it needed: with other types, constants or alignments, each is a stop in the middle of a training."""
    compiled: Counter[str] = dataclasses.field(default_factory=Counter)
    """Those of them that it did not find in the folder."""

    def launches(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for kernel in range(self.driver.played_kernels()):
            counted[self.driver.played_name(kernel).decode()] += self.driver.played_launches(kernel)
        return counted

    def _heard(self, *, src: Any, cache_hit: bool, **_: object) -> None:
        self.variants[src.name] += 1
        self.compiled[src.name] += not cache_hit


def play(folder: Path) -> Played:
    """From now on, in this process, deepfast's backend "triton" takes CPU tensors and launches nothing.

    Args:
        folder: where the driver, the launchers and the compiled kernels lie; any number of processes may share it, and
            what one has compiled the others find.

    Raises:
        RuntimeError: where Triton has a driver already, or interprets.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: nothing would be compiled")
    folder.mkdir(parents=True, exist_ok=True)
    library = _driver(folder)
    # Triton links its launcher to the library in this folder. What is loaded under the same name serves it when that is
    # run, and whatever else asks for the driver, so no search path has to be set before the process starts.
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver.played_name.restype = ctypes.c_char_p
    driver.played_launches.restype = ctypes.c_long

    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver as chosen

    if chosen._active is not None or chosen._default is not None:
        raise RuntimeError("Triton has a driver already: play() comes first")

    class Nothing(CudaDriver):
        """Where Triton would ask torch for the device, it asks nobody."""

        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: CAPABILITY
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=0: 0

    chosen._default = chosen._active = Nothing()
    played = Played(driver)
    triton.knobs.compilation.listener = played._heard

    from deepfast import kernels, ops

    kernels.available = lambda: None
    ops._interpreted = lambda: True  # of the two reasons to take CPU tensors, the one that is asked about
    ops.triton.cache_clear()
    return played


def _driver(folder: Path) -> Path:
    library = folder / "libcuda.so.1"
    with FileLock(f"{library}.lock"):
        if not library.exists():
            found = importlib.util.find_spec("triton")
            if found is None or found.origin is None:
                raise RuntimeError("triton is not installed")
            headers = Path(found.origin).parent / "backends/nvidia/include"
            command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
            command += ["-I", str(headers), str(HERE / "libcuda.c"), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(done.stderr)
    return library
