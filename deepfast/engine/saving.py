"""Writing a checkpoint beside training: each rank's files in a thread of its own, published by rank 0's.

The threads call no collective, which would get between those of training: they talk through the folder in which the
checkpoint is put together. There rank 0 has laid a blank slip for each rank. A rank that has written its files puts its
slip in the place of that one; one that could not says why, or takes it away: even a full disk allows that.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from deepfast.engine import checkpoint
from deepfast.engine.checkpoint import CheckpointError, unwritable
from deepfast.engine.snapshot import Snapshot

log = logging.getLogger("deepfast")

_PAUSE = 0.02  # seconds between two looks at the slips


class Save:
    """One checkpoint on its way to the disk. Python ends only when it has got there.

    Args:
        keep: so many checkpoints are left; None: all.
        timeout: seconds that rank 0 waits for the other ranks' files, after its own.
        latest: whether ``latest`` is to name it.
    """

    def __init__(
        self, directory: Path, tag: str, snapshot: Snapshot, keep: int | None, timeout: float, latest: bool = True
    ) -> None:
        self.directory, self.tag, self.keep, self.timeout = directory, tag, keep, timeout
        self.latest = latest
        self.target = directory / tag
        self.folder = checkpoint.staging(directory, tag)
        self.rank, self.world_size = snapshot.rank, snapshot.world_size
        self._snapshot: Snapshot | None = snapshot
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {tag}")
        atexit.register(self._say_what_nobody_asked)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def check(self) -> None:
        """Raises what went wrong."""
        atexit.unregister(self._say_what_nobody_asked)
        if self._error is not None:
            raise self._error

    def _say_what_nobody_asked(self) -> None:
        self._thread.join()
        if self._error is not None:
            log.error("%s", self._error)

    def _run(self) -> None:
        snapshot, self._snapshot = self._snapshot, None  # whose memory is free when all is written
        if snapshot is None:
            return
        start = time.monotonic()
        try:
            slip = {"sums": snapshot.write(self.folder), "written": snapshot.written}
            expected = snapshot.expected
            del snapshot
            checkpoint.write_atomically(_slip(self.folder, self.rank), json.dumps(slip))
            if self.rank == 0:
                self._publish(expected, start)
        except OSError as error:
            self._fail(unwritable(self.target, error))
        except Exception as error:
            self._fail(error)

    def _publish(self, expected: dict[str, int], start: float) -> None:
        slips = self._collected()
        written: Counter[str] = Counter()
        for slip in slips:
            written.update(slip["written"])
        for key, numel in expected.items():
            if written[key] != numel:
                why = f"of {key!r} the ranks have {written[key]} elements, not {numel}: do all keep the same state?"
                raise unwritable(self.target, why)
        for rank in range(self.world_size):
            _slip(self.folder, rank).unlink()
        size = sum(path.stat().st_size for path in self.folder.iterdir()) / 2**20
        sums = {name: sum_ for slip in slips for name, sum_ in slip["sums"].items()}
        checkpoint.commit(self.directory, self.tag, sums, self.latest)
        log.info("checkpoint %s: %.1f s, %.1f MiB", self.target, time.monotonic() - start, size)
        if self.keep is not None:
            try:
                checkpoint.prune(self.directory, self.keep)
            except OSError as error:  # the new one is there
                log.warning("%s: old checkpoints cannot be deleted: %s", self.directory, error)

    def _collected(self) -> list[dict[str, Any]]:
        """All ranks' slips."""
        deadline = time.monotonic() + self.timeout
        slips: dict[int, dict[str, Any]] = {}
        while missing := [rank for rank in range(self.world_size) if rank not in slips]:
            slips.update((rank, slip) for rank in missing if (slip := self._read_slip(rank)))
            if len(slips) < self.world_size and time.monotonic() > deadline:
                silent = ", ".join(str(rank) for rank in missing if rank not in slips)
                why = f"nothing came within {self.timeout:g} s from rank {silent}; do all ranks see this folder?"
                raise unwritable(self.target, why)
            time.sleep(_PAUSE)
        return [slips[rank] for rank in range(self.world_size)]

    def _read_slip(self, rank: int) -> dict[str, Any] | None:
        try:
            text = _slip(self.folder, rank).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise unwritable(self.target, f"rank {rank} has failed, and could not say why") from None
        slip = json.loads(text) if text else None
        if slip and "error" in slip:
            raise CheckpointError(f"{slip['error']} (rank {rank})")
        return slip

    def _fail(self, error: Exception) -> None:
        """Leaves the disk as it was before."""
        self._error = error
        if self.rank == 0:
            with contextlib.suppress(OSError):  # else the next one clears it away
                checkpoint.discard(self.folder)
            return
        for path in self.folder.glob(f"*-{self.rank}.*"):  # makes room for the slip
            path.unlink(missing_ok=True)
        try:
            checkpoint.write_atomically(_slip(self.folder, self.rank), json.dumps({"error": str(error)}))
        except OSError:
            _slip(self.folder, self.rank).unlink(missing_ok=True)


def lay_out(directory: Path, tag: str, world_size: int) -> None:
    """Begins a checkpoint; on rank 0, before any rank's ``Save``."""
    try:
        folder = checkpoint.begin(directory, tag)
        for rank in range(world_size):
            _slip(folder, rank).touch()
    except OSError as error:
        with contextlib.suppress(OSError):
            checkpoint.discard(checkpoint.staging(directory, tag))
        raise unwritable(directory / tag, error) from None


def _slip(folder: Path, rank: int) -> Path:
    return folder / f".rank{rank}"
