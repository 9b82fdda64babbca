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
from deepfast.build.libraries import BINDING_FLAGS, COMM, CPU, CSRC, CUDA, Library, cxx_flags, link_flags, nvcc_flags
from deepfast.build.said import BuildError, failure, flag
from deepfast.build.targets import architectures

LOG, FAILED = "log", "failed"  # all that was called and said; what was said by who failed
_CXX, _NVCC = "deepfast-c++", "deepfast-nvcc"
# What torch calls in a compiler's place. It takes $CXX for one word, gives all C++ sources of a library the same flags,
# and leaves it to ninja and the shell to tell what ended a compiler. Warnings of what was compiled go to the log only.
_SCRIPT = """#!/bin/sh
set -- {command} "$@"
case "$*" in {bindings}) set -- "$@" {flags};; esac
said=$("$@" 2>&1)
code=$?
[ $code -le 128 ] || [ $code -gt 192 ] || said="the compiler was killed by signal $((code - 128))"
printf '%s\\n' "$ $*" "$said" >>"${{0%/*}}/log"
[ $code -eq 0 ] && exit
printf '%s\\n' "$said" >>"${{0%/*}}/failed"
printf '%s\\n' "$said"
exit $code
"""


@contextlib.contextmanager
def machinery(folder: Path, compilers: list[Compiler]) -> Iterator[Any]:
    """torch.utils.cpp_extension, which meanwhile uses ``compilers``: the C++ compiler and, if wanted, nvcc.

    ``folder``, an empty one, gets what it is to find on its path; it becomes the folder to link from for CUDA.
    """
    cuda = compilers[1:]
    here = folder.absolute()
    bindings = "|".join(f"*/{name}*" for library in (CPU, CUDA, COMM) for name in library.bindings)
    flags = " ".join(BINDING_FLAGS)
    (here / LOG).touch()
    for name, compiler in zip((_CXX, _NVCC), compilers, strict=False):
        (here / name).write_text(_SCRIPT.format(command=shlex.join(compiler.command), bindings=bindings, flags=flags))
        (here / name).chmod(0o755)
    with contextlib.suppress(ImportError):  # ninja may also come without its Python package
        import ninja

        if ninja.BIN_DIR:  # a virtual environment's, which need not be activated
            (folder / "ninja").symlink_to(Path(ninja.BIN_DIR, "ninja"))
    if cuda and (runtime := _static_runtime(cuda[0])):
        (folder / "libcudart.a").symlink_to(runtime)
    changes = {
        "PATH": os.pathsep.join((str(here), os.environ.get("PATH", os.defpath))),
        "CXX": _CXX,
        "CC": None,  # else nvcc would be given that beside our -ccbin
        "PYTORCH_NVCC": _NVCC,
        "MAX_JOBS": str(max_jobs()),
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # it knows no script; a compiler without C++20 says so itself
        "TORCH_NO_COMPILER_WRAPPER": "1",  # ccache if $CXX says so: to it our script is a new compiler each time
        "LC_ALL": "C",  # errors are found by their English names
    }
    logger = logging.getLogger("torch.utils.cpp_extension")
    before, level = {name: os.environ.get(name) for name in changes}, logger.level
    logger.setLevel(logging.ERROR)  # it warns of a machine without a GPU
    _set_environment(changes)
    try:
        from torch.utils import cpp_extension

        with _replaced(cpp_extension, CUDA_HOME=str(Path(cuda[0].program).parents[1]) if cuda else None):
            yield cpp_extension
    finally:
        _set_environment(before)
        logger.setLevel(level)


@contextlib.contextmanager
def _replaced(module: Any, **values: Any) -> Iterator[None]:
    """Those of the module's values that are not None, meanwhile."""
    before = {name: getattr(module, name) for name, value in values.items() if value is not None}
    vars(module).update((name, values[name]) for name in before)
    try:
        yield
    finally:
        vars(module).update(before)


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


def reason(folder: Path, error: Exception) -> BuildError:
    """Why the machinery in ``folder`` failed: what the compiler said, or else torch."""
    said = folder / FAILED
    found = failure(said.read_text(encoding="utf-8", errors="replace") if said.is_file() else str(error))
    said.unlink(missing_ok=True)
    return found


def compile_library(library: Library, compilers: list[Compiler], folder: Path) -> Path:
    """Compiles ``library`` in ``folder``, an empty one, and returns where it lies there.

    Raises:
        BuildError: with the compiler's first error; all that was said is in the folder's ``LOG``.
    """
    cuda = library == CUDA
    with machinery(folder, compilers) as cpp_extension:
        quoted = shlex.quote(cpp_extension.TORCH_LIB_PATH)  # it forgets to
        # From torch 2.14 on: not every file system has locks, and nobody else comes into the folder.
        unlocked = contextlib.nullcontext if hasattr(cpp_extension, "FileLock") else None
        try:
            # Standalone: only that is not loaded here. It may be for another machine, and it comes to its place first.
            # (It finds torch's libraries where they are now; -ltorch_python is left to Library.links.)
            with _replaced(cpp_extension, TORCH_LIB_PATH=quoted, FileLock=unlocked):
                made = cpp_extension.load(
                    library.file.removesuffix(".so"),
                    [str(CSRC / name) for name in library.sources],
                    extra_cflags=[*cxx_flags(library)],
                    extra_cuda_cflags=[*nvcc_flags(compilers[0].program, architectures())] if cuda else None,
                    extra_ldflags=["-shared", "-L.", *link_flags(library)],
                    build_directory=str(folder),
                    is_python_module=False,
                    is_standalone=True,
                )
        except RuntimeError as error:
            raise reason(folder, error) from error
        finally:
            if flag("DEEPFAST_BUILD_VERBOSE"):
                print((folder / LOG).read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    return Path(made)
