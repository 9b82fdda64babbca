"""Where libraries are kept, and how one is published: whole, or not at all.

A library lives in ``<root>/<interface>/<compiler>/`` (keys.py). A machine with a compiler looks for exactly its own;
one without takes any compiler's work. Roots are the package's own ``prebuilt`` folder and the cache.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepfast.build.keys import digest, interface_key, toolchain
from deepfast.build.libraries import CPU, CUDA, Library
from deepfast.build.said import BuildError, say
from deepfast.build.targets import architectures, covered, gpus

PREBUILT = Path(__file__).resolve().parents[1] / "prebuilt"
DIGEST = ".sha256"


def _named_cache() -> Path:
    named = os.environ.get("DEEPFAST_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(named) if named else Path(home) / "deepfast"


def cache_dir() -> Path:
    """``$DEEPFAST_CACHE_DIR``, else ``$XDG_CACHE_HOME/deepfast``, else ``~/.cache/deepfast``; made if need be.

    Where that cannot be written, a folder of this user's own in the system's temporary directory: so a read-only home
    costs one compilation a boot, not the kernels.
    """
    wanted = _named_cache()
    with contextlib.suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    fallback = Path(tempfile.gettempdir()) / f"deepfast-{os.getuid()}"
    with contextlib.suppress(OSError):
        fallback.mkdir(mode=0o700, exist_ok=True)
        status = fallback.lstat()
        # Somebody else's folder of that name could hold somebody else's library.
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and not fallback.is_symlink():
            return fallback
    raise BuildError(
        f"neither {wanted} nor {fallback} can be written: set DEEPFAST_CACHE_DIR to a folder that can", passing=True
    )


def _readable_roots() -> list[Path]:
    """Where a library may already lie: also a cache that can be read but not written."""
    roots = [PREBUILT, _named_cache()]
    with contextlib.suppress(BuildError):
        roots.append(cache_dir())
    return list(dict.fromkeys(roots))


def intact(library: Path) -> bool:
    """Whether the library is there, and is what was published: loading half of one would kill the process."""
    try:
        return library.with_suffix(DIGEST).read_text() == digest(library.read_bytes())
    except OSError:
        return False


def find(library: Library = CPU) -> Path | None:
    """The library for this machine, if it has been built."""
    try:
        own = toolchain(library)[0]
    except BuildError:
        own = None
    for root in _readable_roots():
        folder = root / interface_key(library)
        if own and intact(folder / own / library.file):
            return folder / own / library.file
        # A prebuilt library, and any library where nothing can be compiled, may come from another compiler.
        if root == PREBUILT or own is None:
            found = (path for path in sorted(folder.glob(f"*/{library.file}")) if intact(path) and fits(library, path))
            if any_library := next(found, None):
                return any_library
    return None


def fits(library: Library, path: Path) -> bool:
    """Whether the library, which was compiled elsewhere, holds code for what is wanted here."""
    if library != CUDA:
        return True
    names = [word for word in path.parent.name.split("-") if word.startswith(("sm_", "compute_"))]
    if here := gpus():
        return all(covered(names, gpu) for gpu in here)
    try:
        return set(architectures()) <= set(names)
    except BuildError:
        return False


def seal(library: Path) -> Path:
    """Writes, beside the library, what :func:`intact` looks for."""
    sealed = library.with_suffix(DIGEST)
    sealed.write_text(digest(library.read_bytes()))
    return sealed


def publish(made: Path, target: Path) -> None:
    """Renames the folder of ``made`` to ``target``, with all that is in it."""
    for path in (made, seal(made), made.parent):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(made.parent, target)
    except OSError:
        if not intact(target / made.name):  # else another process was faster, and its work is as good
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the lock is held; some file systems have none, and publishing is atomic all the same."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another process is compiling the kernels: waiting for it")
            lock.acquire()
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
