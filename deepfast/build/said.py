"""What the build says: lines on stderr, and why something could not be compiled."""

from __future__ import annotations

import os
import re
import sys

from deepfast.errors import BuildError


def flag(name: str) -> bool:
    """Whether the environment variable ``name`` is set to something that means yes."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def say(message: str) -> None:
    print(f"deepfast: {message}", file=sys.stderr, flush=True)


_PASSING = (  # what may be otherwise the next time
    r"Killed|by signal \d|to signal \d|No space left|annot allocate memory|memory exhausted|Disk quota"
    r"|pip install ninja"
)


def failure(log: str) -> BuildError:
    """The reason of a failed build, found in what a compiler said."""
    for pattern in (
        r"^the compiler was killed by signal \d+$",  # by our own script: see machinery.py
        r"^.*\b(?:fatal )?error: .*$",
        r"^.*undefined reference.*$",
        r"^.*cannot find.*$",
        r"^.*\S.*$",
    ):
        if found := re.search(pattern, log, re.MULTILINE):
            return BuildError(found.group().strip(), passing=re.search(_PASSING, log) is not None)
    return BuildError("the compiler said nothing")
