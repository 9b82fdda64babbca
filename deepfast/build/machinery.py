"""torch's own machinery (torch.utils.cpp_extension: ninja, its flags, nvcc), told what to compile with, and where.

:func:`machinery` is what setup.py compiles in, too. It imports cpp_extension, which takes a tenth of a second: only who
compiles does that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepfast.build.compilers import Compiler, max_jobs
from deepfast.build.libraries import BINDING_FLAGS, CSRC, CUDA, Library, cxx_flags, link_flags, nvcc_flags
from deepfast.build.said import failure, flag
from deepfast.build.targets import architectures

LOG = "log"
# torch takes $CXX for one word, and gives all C++ sources of a library the same flags; and not every ninja and shell
# tell what ended a compiler.
_CXX = """#!/bin/sh
case "$*" in */bindings/*) set -- "$@" {bindings};; esac
{command} "$@"
code=$?
[ $code -gt 128 ] && echo "the compiler was killed by signal $((code - 128))"
exit $code
"""


@contextlib.contextmanager
def machinery(folder: Path, compilers: list[Compiler]) -> Iterator[Any]:
    """torch.utils.cpp_extension, which meanwhile uses ``compilers``: the C++ compiler and, if wanted, nvcc.

    ``folder``, an empty one, gets what it is to find on its path; it becomes the folder to link from for CUDA.
    """
    cxx, *cuda = compilers
    script = folder / "deepfast-c++"
    script.write_text(_CXX.format(command=shlex.join(cxx.command), bindings=" ".join(BINDING_FLAGS)))
    script.chmod(0o755)
    with contextlib.suppress(ImportError):  # ninja may also come without its Python package
        import ninja

        if ninja.BIN_DIR:  # a virtual environment's, which need not be activated
            (folder / "ninja").symlink_to(Path(ninja.BIN_DIR, "ninja"))
    if cuda and (runtime := _static_runtime(cuda[0])):
        (folder / "libcudart.a").symlink_to(runtime)
    changes = {
        "PATH": os.pathsep.join((str(folder.absolute()), os.environ.get("PATH", os.defpath))),
        "CXX": script.name,
        "CC": None,  # else nvcc would be given that beside our -ccbin
        "PYTORCH_NVCC": shlex.join(cuda[0].command) if cuda else None,
        "MAX_JOBS": str(max_jobs()),
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # it knows no script; a compiler without C++20 says so itself
        "TORCH_NO_COMPILER_WRAPPER": "1",  # ccache where $CXX says so: its key holds a compiler's age
        "LC_ALL": "C",  # errors are found by their English names
    }
    logger = logging.getLogger("torch.utils.cpp_extension")
    before, level = {name: os.environ.get(name) for name in changes}, logger.level
    logger.setLevel(logging.ERROR)  # it warns of a machine without a GPU
    _set_environment(changes)
    try:
        from torch.utils import cpp_extension

        home = cpp_extension.CUDA_HOME
        if cuda:
            cpp_extension.CUDA_HOME = str(Path(cuda[0].program).parents[1])
        try:
            yield cpp_extension
        finally:
            cpp_extension.CUDA_HOME = home
    finally:
        _set_environment(before)
        logger.setLevel(level)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _static_runtime(nvcc: Compiler) -> Path | None:
    """The CUDA runtime as an archive, from where nvcc would link it. torch's -lcudart finds it, under another name.

    Linked in, it shares the driver's context and streams with torch's, whatever its version. (And NVIDIA's Python
    packages have nothing else that -lcudart would find.)
    """
    dry = [*nvcc.command, "--dryrun", str(CSRC / CUDA.kernels[0]), "-o", os.devnull]
    said = subprocess.run(dry, capture_output=True, text=True, check=False).stderr
    folders = re.findall(r'"-L([^"]+)"', said)
    return next((path for folder in folders if (path := Path(folder, "libcudart_static.a")).is_file()), None)


@contextlib.contextmanager
def captured(log: Path) -> Iterator[None]:
    """What this process and its children say goes to ``log``: torch gives ninja file descriptor 1, by its number."""
    with log.open("wb") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, old in enumerate(kept, start=1):
                os.dup2(old, fd)
                os.close(old)


def compile_library(library: Library, compilers: list[Compiler], folder: Path) -> Path:
    """Compiles ``library`` in ``folder``, an empty one, and returns where it lies there.

    Raises:
        BuildError: with the compiler's first error; all that was said is in the folder's ``LOG``.
    """
    log, verbose = folder / LOG, flag("DEEPFAST_BUILD_VERBOSE")
    cxx, cuda = compilers[0], library == CUDA
    with machinery(folder, compilers) as cpp_extension:
        try:
            # Standalone: only then it is not loaded. It may be for another machine, and comes to its place first.
            with captured(log) if verbose else contextlib.nullcontext():
                made = cpp_extension.load(
                    library.file.removesuffix(".so"),
                    [str(CSRC / name) for name in library.sources],
                    extra_cflags=[*cxx_flags(library)],
                    extra_cuda_cflags=[*nvcc_flags(cxx.program, architectures())] if cuda else None,
                    extra_ldflags=["-shared", "-L.", *link_flags(library)],
                    build_directory=str(folder),
                    verbose=verbose,
                    is_python_module=False,
                    is_standalone=True,
                )
        except RuntimeError as error:
            with log.open("a", encoding="utf-8") as file:
                file.write(str(error))
            raise failure(log.read_text(encoding="utf-8", errors="replace")) from error
        finally:
            if verbose:
                print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    return Path(made)
