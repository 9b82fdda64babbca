"""A compiler for tests of the build: it compiles what it has not compiled before, and links.

python compiled_before.py FOLDER COMPILER ARGUMENTS…    FOLDER keeps the objects

Many builds of the same sources are then as many links: what is around the compiler is what tests of the build test.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock


def key(command: list[str], source: Path) -> str:
    """Of the command, the source, and the headers of csrc/, wherever that lies."""
    csrc = source.parent.parent
    files = [source, *sorted(csrc.rglob("*.h"))]
    parts = [part for p in files for part in (str(p.relative_to(csrc)).encode(), p.read_bytes())]
    return hashlib.sha256(b"\0".join([*(w.encode() for w in command if w != str(source)), *parts])).hexdigest()


def main(folder: Path, command: list[str]) -> int:
    if "-c" not in command:
        return subprocess.run(command, check=False).returncode
    at = command.index("-o")
    out, compile_it = command[at + 1], [*command[:at], *command[at + 2 :]]
    folder.mkdir(exist_ok=True)
    kept = folder / key(compile_it, Path(compile_it[compile_it.index("-c") + 1]))
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            with tempfile.NamedTemporaryFile(dir=folder) as made:
                done = subprocess.run([*compile_it, "-o", made.name], check=False)
                if done.returncode:
                    return done.returncode
                shutil.copy(made.name, kept)
    shutil.copy(kept, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
