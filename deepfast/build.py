"""Compiles the kernels on first use and keeps them; finds them again in milliseconds.

A library lives in ``<root>/<interface>/<compiler>/``: ``interface`` names everything that decides whether a library
can be loaded and would be right here (sources, flags, torch and CUDA versions, architecture, the CPU's instruction
set), ``compiler`` the compiler that made it. A machine with a compiler looks for exactly its own; one without takes
any compiler's work. Roots are the package's own ``prebuilt`` folder and the cache.

A build happens in a private folder and is published by one atomic rename, so a reader sees a whole library or none.
The lock only spares N processes the same work: it is flock's, and dies with its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
CSRC = next((p for p in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if p.is_dir()), _PACKAGE / "csrc")
PREBUILT = _PACKAGE / "prebuilt"
LIBRARY, DIGEST = "libdeepfast.so", "libdeepfast.sha256"

# One source list for the first import and for DEEPFAST_PREBUILD.
KERNELS = ("cpu/step.cpp", "cpu/statistics.cpp", "cpu/accumulate.cpp")
BINDINGS = ("bindings/ops.cpp",)

# -ffp-contract=off: a multiply-add is fused where the source says fma, nowhere else (bitwise agreement).
# -fno-math-errno -fno-trapping-math: let sqrt and comparisons be vectorized; they change no result.
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall")
KERNEL_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
BINDING_FLAGS = ("-O1",)  # no loops there, and its includes are most of the build time
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"AVX2": _AVX2, "AVX512": _AVX512}


class BuildError(RuntimeError):
    """The kernels could not be compiled. ``passing`` if trying again may help (full disk, killed compiler)."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


def flag(name: str) -> bool:
    """Whether the environment variable ``name`` is set to something that means yes."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def say(message: str) -> None:
    print(f"deepfast: {message}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{Path(self.command[-1]).name} {self.version}"


@functools.cache
def compiler() -> Compiler | None:
    """The C++ compiler: ``$CXX``, else g++, c++ or clang++ on the path; None if there is none that runs."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "c++", "clang++"]:
        command = tuple(shlex.split(candidate))
        if command and shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                version = subprocess.run(
                    [*command, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=True
                )
                return Compiler(command, version.stdout.strip())
    return None


def capability() -> str:
    """The instruction set to compile for: torch's own choice, so ``ATEN_CPU_CAPABILITY`` holds here too."""
    return torch.backends.cpu.get_cpu_capability()


def _digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]


@functools.cache
def interface_key() -> str:
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp"))
    sources = [part for p in files for part in (str(p.relative_to(CSRC)).encode(), p.read_bytes())]
    flags = " ".join((*COMMON_FLAGS, *KERNEL_FLAGS, *BINDING_FLAGS, *INSTRUCTION_SETS.get(capability(), ())))
    abi = f"{torch.__version__} {torch.version.cuda} {torch.compiled_with_cxx11_abi()} {platform.machine()}"
    return f"{platform.machine()}-{capability().lower()}-{_digest(*sources, flags, abi, capability())}"


def compiler_key(cxx: Compiler) -> str:
    return f"{Path(cxx.command[-1]).name}-{_digest(cxx.version, *cxx.command)}"


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
        return library.with_name(DIGEST).read_text() == _digest(library.read_bytes())
    except OSError:
        return False


def find() -> Path | None:
    """The library for this machine, if it has been built."""
    cxx = compiler()
    for root in _readable_roots():
        if cxx:
            library = root / interface_key() / compiler_key(cxx) / LIBRARY
            if intact(library):
                return library
        # A prebuilt library, and any library where nothing can be compiled, may come from another compiler.
        if root == PREBUILT or cxx is None:
            found = filter(intact, sorted((root / interface_key()).glob(f"*/{LIBRARY}")))
            if any_library := next(found, None):
                return any_library
    return None


def _first_error(log: str) -> str:
    for pattern in (r"^.*\b(?:fatal )?error: .*$", r"^.*undefined reference.*$", r"^.*cannot find.*$"):
        if match := re.search(pattern, log, re.MULTILINE):
            return match.group().strip()
    return next((line.strip() for line in log.splitlines() if line.strip()), "the compiler said nothing")


def _run(command: list[str], log: list[str]) -> None:
    if flag("DEEPFAST_BUILD_VERBOSE"):
        say(shlex.join(command))
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    log.append(f"$ {shlex.join(command)}\n{done.stdout}")
    if done.stdout and flag("DEEPFAST_BUILD_VERBOSE"):
        print(done.stdout, file=sys.stderr)
    if done.returncode:
        passing = done.returncode < 0 or re.search(
            r"Killed|No space left|annot allocate memory|memory exhausted|Disk quota", done.stdout
        )
        said = f"the compiler was killed by signal {-done.returncode}" if done.returncode < 0 else None
        raise BuildError(said or _first_error(done.stdout), passing=bool(passing))


def _compile(cxx: Compiler, folder: Path, log: list[str]) -> None:
    torch_root = Path(torch.__file__).parent
    include = torch_root / "include"
    isa = INSTRUCTION_SETS.get(capability(), ())
    jobs = [(name, (*KERNEL_FLAGS, *isa)) for name in KERNELS]
    jobs += [(name, (*BINDING_FLAGS, "-isystem", str(include))) for name in BINDINGS]
    jobs.reverse()  # the longest first
    objects = [folder / (name.replace("/", "_") + ".o") for name, _ in jobs]
    commands = [
        [*cxx.command, *COMMON_FLAGS, *flags, "-c", str(CSRC / name), "-o", str(obj)]
        for (name, flags), obj in zip(jobs, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_jobs()) as pool:
        list(pool.map(lambda command: _run(command, log), commands))
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    # torch's libgomp and the system's carry the same soname: whichever is loaded first serves both, with one pool.
    _run([*cxx.command, "-shared", "-fopenmp", *map(str, objects), *libraries, "-o", str(folder / LIBRARY)], log)
    for obj in objects:
        obj.unlink()


def max_jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isdigit() and int(value) > 0):
        raise BuildError(f"MAX_JOBS={value!r} is not a positive number", passing=True)
    return int(value) if value else len(os.sched_getaffinity(0))


def _publish(folder: Path, target: Path) -> None:
    (folder / DIGEST).write_text(_digest((folder / LIBRARY).read_bytes()))
    for path in (folder / LIBRARY, folder / DIGEST, folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError:
        if not intact(target / LIBRARY):  # else another process was faster, and its work is as good
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
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


def build(root: Path | None = None, *, retry: bool = False) -> Path:
    """Compiles the kernels into ``root`` (the cache) and returns the library's path.

    Returns at once if they are there. ``retry``: compile even if an earlier attempt with the same sources, flags and
    compiler failed.

    Raises:
        BuildError: with the compiler's first error, the log's path and what to do.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError(
            f"no C++ compiler found ({'CXX=' + os.environ['CXX'] if os.environ.get('CXX') else 'g++, c++, clang++'}): "
            "install one (Debian, Ubuntu: apt install g++) or set CXX",
            passing=True,
        )
    root = cache_dir() if root is None else root
    target = root / interface_key() / compiler_key(cxx)
    name = f"{interface_key()}-{compiler_key(cxx)}"
    failed = root / f"{name}.failed"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock") as alone:
            if intact(target / LIBRARY):
                return target / LIBRARY
            shutil.rmtree(target, ignore_errors=True)  # damaged, if anything
            if failed.is_file() and not retry:
                raise BuildError(failed.read_text())
            for leftover in root.glob(f"{name}.build-*") if alone else ():  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{name}.build-", dir=root))
            try:
                _build_into(folder, target, cxx, failed)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"could not write to {root}: {error.strerror or error}", passing=True) from error
    return target / LIBRARY


def _build_into(folder: Path, target: Path, cxx: Compiler, failed: Path) -> None:
    say(f"compiling the CPU kernels for {capability()} with {cxx} into {target} (once for this machine and torch)")
    start = time.perf_counter()
    log: list[str] = []
    try:
        _compile(cxx, folder, log)
    except BuildError as error:
        log_path = failed.with_suffix(".log")
        log_path.write_text("\n".join(log))
        remedy = "mend that and run: python -m deepfast build"
        message = f"could not compile the CPU kernels: {error} (log: {log_path}); {remedy}"
        if not error.passing:
            failed.write_text(message)
        raise BuildError(message, passing=error.passing) from None
    folder.chmod(0o755)  # mkdtemp's is private; a shared cache is read by others
    _publish(folder, target)
    failed.unlink(missing_ok=True)
    say(f"compiled in {time.perf_counter() - start:.1f} s")


def load() -> Path:
    """Finds or builds the library and registers its operators as ``torch.ops.deepfast``.

    Raises:
        BuildError: if there is no library and none can be built.
    """
    library = find()
    if library is None:
        if flag("DEEPFAST_DISABLE_JIT"):
            raise BuildError(
                "no compiled kernels for this machine, and DEEPFAST_DISABLE_JIT forbids compiling: run "
                "`python -m deepfast build` where it may",
                passing=True,
            )
        library = build()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}; delete {library.parent} to compile it again") from error
    return library
