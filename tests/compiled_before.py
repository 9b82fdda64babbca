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
    words = [word.encode() for word in command if word != str(source)]
    return hashlib.sha256(b"\0".join([*words, *parts])).hexdigest()


def without(command: list[str], *options: str) -> list[str]:
    """The command without these options, which have an argument, and without what they would need (-MMD)."""
    pairs = zip(command, ["", *command], strict=False)
    return [word for word, before in pairs if word not in (*options, "-MMD") and before not in options]


def main(folder: Path, command: list[str]) -> int:
    if "-c" not in command:
        return subprocess.run(command, check=False).returncode
    out, compile_it = command[command.index("-o") + 1], without(command, "-o", "-MF")
    folder.mkdir(exist_ok=True)
    kept = folder / key(compile_it, Path(next(word for word in compile_it if word.endswith(".cpp"))))
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
