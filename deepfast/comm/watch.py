"""Who ends the waits of kernels on a GPU whose peers do not come: a thread of the host."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

from torch import Tensor


class Watch:
    """Ends the waits of kernels whose peers have died, or are silent at the timeout. The host's only part in a wait.

    ``status`` (int32, pinned) is what host and device tell each other: see ``Status`` in ``csrc/cuda/collectives.h``.
    ``ranks``: what the whole group calls the host's. ``patience``: seconds beyond the timeout for an all-gather, to
    which a rank may come late because it waits for another host; whoever is to blame is found there.
    """

    GIVE_UP, BEGUN, ENDED, DISAGREE, KIND, MISSING = range(6)
    ALL_GATHER = 2

    def __init__(self, status: Tensor, ranks: list[int], gone: Callable[[], list[int]], timeout: float,
                 patience: float) -> None:  # fmt: skip
        self.status, self.gone, self.timeout, self.patience = status, gone, timeout, patience
        self.missing: list[int] = []
        self.why = ""
        self.found = threading.Event()  # `missing` and `why` are known; or nobody wants to know
        self._ranks = ranks
        thread = threading.Thread(target=_watch, args=(weakref.ref(self), self.found), daemon=True)
        thread.start()
        # At the process's end at the latest: who comes back from C++ into a Python that is gone aborts the process.
        weakref.finalize(self, _end, self.found, thread)

    def look(self, since: float) -> None:
        """An operation that began at ``since`` is under way."""
        if self.status[self.DISAGREE]:  # some thread blocks may wait for others that the peers do not have
            self.status[self.GIVE_UP] = 1
            self.found.set()
            return
        gone = self.gone()
        patience = self.patience if self.status[self.KIND] == self.ALL_GATHER else 0.0
        if gone:
            self.why = "died or left"
        elif time.monotonic() - since > self.timeout + patience:
            self.why = "silent at the timeout"
        else:
            return
        self.status[self.GIVE_UP] = 1
        if not gone:  # the kernel says who had not come
            until = time.monotonic() + 1
            while not gone and time.monotonic() < until:
                time.sleep(0.001)
                late = self.status[self.MISSING : self.MISSING + len(self._ranks)].tolist()
                gone = [rank for rank, is_late in zip(self._ranks, late, strict=True) if is_late]
        self.missing = gone
        self.found.set()


def _end(over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    if thread is not threading.current_thread():
        thread.join()


def _watch(watch: weakref.ref[Watch], over: threading.Event) -> None:
    last, since = 0, 0.0
    while not over.wait(0.02):
        alive = watch()
        if alive is None:
            return
        begun, ended = alive.status[Watch.BEGUN : Watch.ENDED + 1].tolist()
        if begun == ended:
            last = 0
        elif begun != last:
            last, since = begun, time.monotonic()
        else:
            alive.look(since)
        del alive
