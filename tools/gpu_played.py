"""A GPU that is played, for the rehearsal of the session: "cuda" means the CPU, whose kernels are the CUDA kernels run
on the host (tests/on_host.py), or Triton's, compiled and launched on a libcuda that only says yes (tests/triton_dry).

A process plays where $DEEPFAST_PLAYED names a folder that ``prepared`` has filled; it is a plugin of pytest, too.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

PLAYED = Path(os.environ["DEEPFAST_PLAYED"]) if "DEEPFAST_PLAYED" in os.environ else None


def prepared(folder: Path) -> dict[str, str]:
    """Compiles what is played into ``folder``, once; returns the environment of a process that plays."""
    import on_host

    folder.mkdir(parents=True, exist_ok=True)
    on_host.backend(folder)
    for name in ("harness", "ranks"):
        on_host.program(folder, name)
    return {"DEEPFAST_PLAYED": str(folder)}


def device() -> object:
    """That of the session's tensors."""
    import torch

    return torch.device("cpu" if PLAYED else "cuda")


class Event:
    """As much of torch.cuda.Event as timing takes."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


@functools.cache
def triton() -> None:
    from triton_dry.play import play

    play(PLAYED / "triton")


def play() -> None:
    """From now on, backend="cuda" and backend="triton" take CPU tensors, and what torch.cuda is asked it answers."""
    import on_host
    import torch

    from deepfast import ops

    cuda, named = on_host.played_cuda(on_host.backend(PLAYED)), ops._named

    def played(name: str, on: torch.device) -> object:
        if name == "triton":
            triton()
        return cuda if name == "cuda" else named(name, on)

    ops._named = played
    torch.cuda.Event = Event
    for name in ("_sleep", "synchronize", "empty_cache", "set_device"):
        setattr(torch.cuda, name, lambda *_: None)  # not one for all: torch.compile's tables are by function
    torch.cuda.mem_get_info = lambda *_: (64 << 30, 64 << 30)


if PLAYED:
    play()
