"""How much of a host's memory several processes have, page by page: what they share counts once (PSS)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


def resident(pids: Sequence[int]) -> int:
    """Bytes, of all of them together."""
    lines = (s for pid in pids for s in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def trim() -> None:
    """Gives back what this process has freed: what is new after it is seen."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The most that was seen, in bytes."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids, self.bytes = pids, resident(pids)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A thread looks again and again while the block runs, a fifth of the time: a look holds up whoever asks for a
        page meanwhile."""
        ended = threading.Event()

        def look() -> None:
            took = 0.0
            while not ended.wait(4 * took):
                start = time.perf_counter()
                self.bytes = max(self.bytes, resident(self.pids))
                took = time.perf_counter() - start

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
