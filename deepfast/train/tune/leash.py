"""``python leash.py PID COMMAND …`` becomes the command, unless the process PID has died by then: one that dies with
who has started it, and before anybody else where memory runs out. Both hold for what becomes of it by exec; the second
for its children, too.

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
    try:
        os.kill(int(sys.argv[1]), 0)  # who died while this process began is no parent whose death would be told
    except ProcessLookupError:
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606


if __name__ == "__main__":
    main()
