"""Ctrl-C and SIGTERM: the step is finished and a checkpoint saved; a second one is final."""

from __future__ import annotations

import os
import signal


class StoppedTwiceError(Exception):
    """The user does not want to wait for the checkpoint."""


class Stop:
    """Turns the first SIGINT or SIGTERM into a flag that the loop looks at between steps; a second one is final."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.signal:
            raise StoppedTwiceError("stopped at once by a second signal: what came after the last checkpoint is lost")
        self.signal = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step, with a checkpoint (a second signal: at once, without)\n")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0
