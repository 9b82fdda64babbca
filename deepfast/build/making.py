"""A library is made: once, whatever happens in the middle of it.

In a private folder, published by one atomic rename, so a reader sees a whole library or none. The lock only spares N
processes the same work: it is flock's, and dies with its process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from deepfast.build.cache import cache_dir, find, intact, locked, publish
from deepfast.build.compilers import Compiler
from deepfast.build.keys import interface_key, toolchain
from deepfast.build.libraries import CPU, CUDA, Library, wanted
from deepfast.build.said import BuildError, flag, say
from deepfast.build.targets import architectures, capability, check_covered


def build(root: Path | None = None, library: Library = CPU, *, retry: bool = False) -> Path:
    """Compiles ``library`` into ``root`` (the cache) and returns its path.

    Returns at once if they are there. ``retry``: compile even if an earlier attempt with the same sources, flags and
    compiler failed.

    Raises:
        BuildError: with the compiler's first error, the log's path and what to do.
    """
    own, compilers = toolchain(library)
    root = cache_dir() if root is None else root
    target = root / interface_key(library) / own
    name = f"{interface_key(library)}-{own}"
    failed = root / f"{name}.failed"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{name}.lock") as alone:
            if intact(target / library.file):
                return target / library.file
            shutil.rmtree(target, ignore_errors=True)  # damaged, if anything
            if failed.is_file() and not retry:
                raise BuildError(failed.read_text())
            for leftover in root.glob(f"{name}.build-*") if alone else ():  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{name}.build-", dir=root))
            try:
                _build_into(folder, target, library, compilers, failed)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"could not write to {root}: {error.strerror or error}", passing=True) from error
    return target / library.file


def remembered(library: Library) -> str | None:
    """What an attempt with these sources, flags and compiler has failed with; it is not made again by itself.

    Raises:
        BuildError: where none could be made.
    """
    own, _ = toolchain(library)
    failed = cache_dir() / f"{interface_key(library)}-{own}.failed"
    return failed.read_text() if failed.is_file() else None


def _build_into(folder: Path, target: Path, library: Library, compilers: list[Compiler], failed: Path) -> None:
    from deepfast.build.machinery import LOG, compile_library  # of use to nobody who finds what he looks for

    what, machine = f"the {library.kind} kernels", ", ".join(architectures()) if library == CUDA else capability()
    say(f"compiling {what} for {machine} with {compilers[-1]} into {target} (once for this machine and torch)")
    start = time.perf_counter()
    work = folder / "work"
    work.mkdir()
    try:
        made = compile_library(library, compilers, work)
    except BuildError as error:
        log = failed.with_suffix(".log")
        shutil.copyfile(work / LOG, log)
        message = f"could not compile {what}: {error} (log: {log}); mend that and run: python -m deepfast build"
        if not error.passing:
            failed.write_text(message)
        raise BuildError(message, passing=error.passing) from None
    made = made.rename(folder / library.file)
    shutil.rmtree(work)
    folder.chmod(0o755)  # mkdtemp's is private; a shared cache is read by others
    publish(made, target)
    failed.unlink(missing_ok=True)
    say(f"compiled in {time.perf_counter() - start:.1f} s")


def build_all() -> dict[Library, Path | BuildError]:
    """Compiles, into the cache, what can be compiled here; says what is left out, and why.

    For each library where it is, or what kept it from being made. What failed before is tried again. Without a GPU, the
    CUDA kernels are compiled for ``$TORCH_CUDA_ARCH_LIST``; a torch without CUDA leaves nothing out.
    """
    made: dict[Library, Path | BuildError] = {}
    for library in wanted():
        try:
            made[library] = find(library) or build(library=library, retry=True)
        except BuildError as error:
            say(f"without the {library.kind} kernels: {error}")
            made[library] = error
    return made


def locate(library: Library = CPU) -> Path:
    """Finds or builds ``library``.

    Raises:
        BuildError: if there is no library and none can be built.
    """
    if library == CUDA and os.environ.get("TORCH_CUDA_ARCH_LIST"):
        check_covered(architectures())
    path = find(library)
    if path is None:
        if flag("DEEPFAST_DISABLE_JIT"):
            raise BuildError(
                "no compiled kernels for this machine, and DEEPFAST_DISABLE_JIT forbids compiling: run "
                "`python -m deepfast build` where it may",
                passing=True,
            )
        path = build(library=library)
    return path
