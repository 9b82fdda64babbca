"""How much memory there is, a limit that a process obeys, and errors that mean there was too little."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PAUSE = 0.02  # seconds between two looks: some 100 MB, as fast as a CPU makes pages


def size(text: str) -> int:
    """Bytes of "8GiB", "500 MB", "2g". Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no size: one like 8GiB was expected")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def said(size: float) -> str:
    """Bytes as one reads them."""
    return f"{size / 2**30:.1f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.0f} MiB"


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that may still be taken: what the host has, or what the cgroups of this process leave of it, of both kinds.

    None where the system does not say.
    """
    found = []
    with contextlib.suppress(OSError):
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                found += _left(groups, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in kinds.split(","):
                v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                found += _left(groups / "memory", path, *v1)
    return min(found, default=None)


def _left(root: Path, path: str, limit: str, usage: str, cached: str) -> list[int]:
    """What each group from ``path`` up to the root leaves; in a container only the root may be there to be read."""
    folder, found = root / path.strip("/"), []
    for group in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            found.append(most - used + int(stat.get(cached, 0)))  # files' pages make room
        if group == root:
            break
    return found


def obey(limit: int, exceeded: Callable[[], None]) -> None:
    """From now on: ``exceeded`` is called, in a thread, when the resident pages of this process are more bytes.

    A limit of the kernel's counts what is reserved (RLIMIT_AS, RLIMIT_DATA: threads' stacks, a library's arenas), and
    not what ranks share.
    """
    page = os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        while int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page <= limit:
            time.sleep(_PAUSE)
        exceeded()

    threading.Thread(target=watch, daemon=True).start()


def ran_out(error: BaseException) -> bool:
    """Whether there was too little memory, of a host or a GPU, by whatever name it is raised."""
    words = ("allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
