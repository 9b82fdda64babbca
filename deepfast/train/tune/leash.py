"""``python leash.py PID COMMAND …`` becomes the command, as one that dies with its parent and, where memory runs out,
before anybody else. Both hold for what becomes of it by exec; the second for its children, too.

PID is the parent's: if that has died by then, nothing begins. A word ``{}`` of the command becomes the PID that it
has itself, for a leash that it starts.

It is run by its path and imports nothing of deepfast: it is there before anything takes time.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent, *command = sys.argv[1:]
    # Who died before that is no parent any more. (Whether there is a process of that PID would tell nothing: a dead one
    # keeps its PID until somebody has asked how it ended.)
    if os.getppid() != int(parent):
        sys.exit(1)
    own = [str(os.getpid()) if word == "{}" else word for word in command]
    os.execvp(own[0], own)  # noqa: S606


if __name__ == "__main__":
    main()
