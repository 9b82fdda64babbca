"""Compiles the kernels on first use and keeps them; finds them again in milliseconds.

There are three libraries: the CPU kernels, the CUDA kernels where torch has CUDA and nvcc is to be had, and the
communication between ranks, a Python extension module that is made when it is first needed.

A library lives in ``<root>/<interface>/<compiler>/``: ``interface`` names everything that decides whether a library
can be loaded and would be right here (sources, flags, torch and CUDA versions, architecture, the CPU's instruction
set), ``compiler`` the compiler that made it (and the GPUs it made it for). A machine with a compiler looks for exactly
its own; one without takes any compiler's work. Roots are the package's own ``prebuilt`` folder and the cache.

A build happens in a private folder and is published by one atomic rename, so a reader sees a whole library or none.
The lock only spares N processes the same work: it is flock's, and dies with its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
CSRC = next((p for p in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if p.is_dir()), _PACKAGE / "csrc")
PREBUILT = _PACKAGE / "prebuilt"
DIGEST = ".sha256"


@dataclasses.dataclass(frozen=True)
class Library:
    """One source list for the first use and for DEEPFAST_PREBUILD."""

    kind: str
    kernels: tuple[str, ...]  # torch-free
    bindings: tuple[str, ...]
    suffixes: tuple[str, ...]  # of what it is made from

    @property
    def file(self) -> str:
        return f"libdeepfast_{self.kind.lower()}.so"


CPU = Library(
    "CPU",
    ("cpu/step.cpp", "cpu/statistics.cpp", "cpu/accumulate.cpp", "cpu/refresh.cpp"),
    ("bindings/ops.cpp",),
    (".h", ".cpp"),
)
CUDA = Library(
    "CUDA",
    (
        "cuda/step.cu",
        "cuda/collectives.cu",
        "cuda/statistics.cu",
        "cuda/accumulate.cu",
        "cuda/refresh.cu",
        "cuda/scaler.cu",
        "cuda/table.cu",
    ),
    ("bindings/cuda_ops.cpp",),
    (".h", ".cpp", ".cu", ".cuh"),
)
COMM = Library(
    "Comm",
    ("cpu/collectives.cpp", "cpu/peers.cpp", "cpu/statistics.cpp"),
    ("bindings/comm.cpp",),
    (".h", ".cpp"),
)

# -ffp-contract=off: a multiply-add is fused where the source says fma, nowhere else (bitwise agreement).
# -fno-math-errno -fno-trapping-math: let sqrt and comparisons be vectorized; they change no result.
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall")
KERNEL_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
BINDING_FLAGS = ("-O1",)  # no loops there, and its includes are most of the build time
# -fmad=false: as -ffp-contract=off. Division and square root are the IEEE ones, denormals are kept: nvcc's default.
CUDA_FLAGS = ("-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
OLDEST_NVCC = (12, 1)  # kernels with more than 4 KiB of parameters
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"AVX2": _AVX2, "AVX512": _AVX512}
CPUINFO = Path("/proc/cpuinfo")


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

    @property
    def program(self) -> str:
        """The compiler itself, of a command like `ccache g++ -m64`."""
        return next(word for word in reversed(self.command) if not word.startswith("-"))

    def __str__(self) -> str:
        return f"{Path(self.program).name} {self.version}"


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


@functools.cache
def nvcc() -> Compiler | str:
    """CUDA's compiler, or why there is none that fits torch.

    Looked for in ``$CUDA_HOME``, on the path, in ``/usr/local/cuda`` and in NVIDIA's Python packages.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packages = [Path(p) / "nvidia" for p in (*site.getsitepackages(), site.getusersitepackages(), *sys.path)]
    candidates = [
        *([Path(named) / "bin/nvcc"] if named else []),
        *map(Path, filter(None, [shutil.which("nvcc")])),
        Path("/usr/local/cuda/bin/nvcc"),
        *(path for folder in packages for path in (folder / "cu13/bin/nvcc", folder / "cuda_nvcc/bin/nvcc")),
    ]
    unfit = []
    for path in filter(Path.is_file, candidates):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release (\d+)\.(\d+)", said)
            if release is None:
                continue
            version = int(release[1]), int(release[2])
            wanted = torch.version.cuda
            if version >= OLDEST_NVCC and (wanted is None or wanted.split(".")[0] == release[1]):
                return Compiler((str(path),), f"{version[0]}.{version[1]}")
            unfit.append(f"{path} is of CUDA {version[0]}.{version[1]}")
    needed = f"CUDA {torch.version.cuda.split('.')[0]}" if torch.version.cuda else "CUDA"
    return (
        f"no nvcc of {needed} found, 12.1 or later"
        + (f" ({'; '.join(unfit)})" if unfit else "")
        + ": install the CUDA toolkit, or set CUDA_HOME to where it is"
    )


def architectures() -> tuple[str, ...]:
    """What to compile for: ``$TORCH_CUDA_ARCH_LIST`` ("8.0;9.0a;12.0+PTX"), else the GPUs that torch sees.

    Raises:
        BuildError: if the list cannot be read, or there is neither list nor GPU.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not listed:
        if not torch.cuda.is_available():
            raise BuildError('no GPU to compile for: set TORCH_CUDA_ARCH_LIST ("8.0;9.0")', passing=True)
        return tuple(f"sm_{gpu}" for gpu in sorted(set(gpus())))
    names = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed!r}: {entry!r} is no compute capability (like 9.0)", True)
        number = f"{match[1]}{match[2]}{match[3]}"
        names += [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]
    return tuple(dict.fromkeys(names))


def gpus() -> list[int]:
    """The compute capabilities of the GPUs that torch sees, 90 for 9.0."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))]


def covered(names: Iterable[str], gpu: int) -> bool:
    """Whether code for ``names`` (sm_90, sm_90a, compute_90) runs on a GPU of compute capability ``gpu``."""
    for name in names:
        kind, _, number = name.partition("_")
        wanted = int(re.sub(r"\D", "", number))
        exact = number[-1:].isalpha()
        if wanted == gpu or (not exact and wanted < gpu and (kind == "compute" or wanted // 10 == gpu // 10)):
            return True
    return False


def check_covered(names: tuple[str, ...]) -> None:
    """Raises BuildError if torch sees a GPU that code for ``names`` does not run on."""
    for gpu in gpus():
        if not covered(names, gpu):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST')!r} leaves out the GPU that is here "
                f"({gpu // 10}.{gpu % 10}): add it, or unset the variable",
                passing=True,
            )


def arch_flags(names: tuple[str, ...]) -> list[str]:
    """nvcc's flags for machine code (sm_90) and, where asked for, PTX (compute_90)."""
    return [flag for name in names for flag in ("-gencode", f"arch={name.replace('sm_', 'compute_')},code={name}")]


def capability() -> str:
    """The instruction set to compile for: torch's own choice, so ``ATEN_CPU_CAPABILITY`` holds here too."""
    return torch.backends.cpu.get_cpu_capability()


def instruction_set() -> tuple[tuple[str, ...], str]:
    """The compiler's flags for this machine's CPU, and what else their meaning depends on, for the key.

    On 64-bit Arm the compiler finds out by itself what the CPU has, from the lines that are returned here.
    """
    if platform.machine() != "aarch64" or os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        return INSTRUCTION_SETS.get(capability(), ()), ""
    said: list[str] = []
    with contextlib.suppress(OSError):
        said = re.findall(r"^(?:Features|CPU (?:implementer|variant|part))\s*:.*", CPUINFO.read_text(), re.MULTILINE)
    return ("-mcpu=native",), "\n".join(sorted(set(said)))


def _digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]


@functools.cache
def interface_key(library: Library = CPU) -> str:
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in library.suffixes)
    sources = [part for p in files for part in (str(p.relative_to(CSRC)).encode(), p.read_bytes())]
    abi = f"{torch.__version__} {torch.version.cuda} {torch.compiled_with_cxx11_abi()} {platform.machine()}"
    if library == CUDA:
        flags = " ".join((*COMMON_FLAGS, *CUDA_FLAGS, *BINDING_FLAGS))
        return f"{platform.machine()}-cuda-{_digest(*sources, flags, abi)}"
    if library == COMM:
        abi += f" {sys.implementation.cache_tag}"
    native, cpu = instruction_set()
    flags = " ".join((*COMMON_FLAGS, *KERNEL_FLAGS, *BINDING_FLAGS, *native))
    abi += cpu
    return f"{platform.machine()}-{capability().lower()}-{_digest(*sources, flags, abi, capability())}"


def compiler_key(*compilers: Compiler) -> str:
    parts = [part for c in compilers for part in (c.version, *c.command)]
    return f"{Path(compilers[0].command[-1]).name}-{_digest(*parts)}"


def toolchain(library: Library) -> tuple[str, list[Compiler]]:
    """The name of a library's folder, and the compilers that make it.

    Raises:
        BuildError: if one of them is missing.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError(
            f"no C++ compiler found ({'CXX=' + os.environ['CXX'] if os.environ.get('CXX') else 'g++, c++, clang++'}): "
            "install one (Debian, Ubuntu: apt install g++) or set CXX",
            passing=True,
        )
    if library != CUDA:
        return compiler_key(cxx), [cxx]
    if torch.version.cuda is None:
        raise BuildError(f"this torch ({torch.__version__}) is built without CUDA", passing=True)
    cuda = nvcc()
    if isinstance(cuda, str):
        raise BuildError(cuda, passing=True)
    return "-".join((compiler_key(cuda, cxx), *architectures())), [cxx, cuda]


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
        return library.with_suffix(DIGEST).read_text() == _digest(library.read_bytes())
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
            found = (path for path in sorted(folder.glob(f"*/{library.file}")) if intact(path) and _fits(library, path))
            if any_library := next(found, None):
                return any_library
    return None


def _fits(library: Library, path: Path) -> bool:
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


def compile_commands(library: Library, compilers: list[Compiler], arch: list[str]) -> dict[str, list[str]]:
    """For each source, the longest first: the command that compiles it, but for ``-o`` and the object's name."""
    cxx, *cuda = compilers
    bind = [*cxx.command, *COMMON_FLAGS, *BINDING_FLAGS, "-isystem", str(Path(torch.__file__).parent / "include")]
    if library == COMM:
        bind += ["-isystem", sysconfig.get_path("include")]
    if cuda:
        kernel = [*cuda[0].command, "-ccbin", cxx.program, *CUDA_FLAGS, *arch]
    else:
        kernel = [*cxx.command, *COMMON_FLAGS, *KERNEL_FLAGS, *instruction_set()[0]]
    jobs = [(name, bind) for name in library.bindings] + [(name, kernel) for name in library.kernels]
    return {name: [*command, "-c", str(CSRC / name)] for name, command in jobs}


def _compile(library: Library, compilers: list[Compiler], folder: Path, log: list[str]) -> None:
    arch = arch_flags(architectures()) if library == CUDA else []
    commands = compile_commands(library, compilers, arch)
    objects = [folder / (name.replace("/", "_") + ".o") for name in commands]
    whole = [[*command, "-o", str(obj)] for command, obj in zip(commands.values(), objects, strict=True)]
    with ThreadPoolExecutor(max_jobs()) as pool:
        list(pool.map(lambda command: _run(command, log), whole))
    cxx, *cuda = compilers
    # torch's libgomp and the system's carry the same soname: whichever is loaded first serves both, with one pool.
    # Some compilers link their own C++ library in. What comes out of an archive is kept from the other libraries of the
    # process: ours and torch's would else share a few symbols, and messages lose their numbers or end the process.
    link = [*cxx.command, "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL"]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    if library == COMM:
        libraries.append("-ltorch_python")
    if cuda:
        # The CUDA runtime is linked in: it shares the driver's context and streams with torch's, whatever its version.
        link = [*cuda[0].command, "-ccbin", cxx.program, "-shared", "-cudart", "static", "-Xcompiler", "-fopenmp"]
        link += ["-Xlinker", "--exclude-libs=ALL"]
        libraries.append("-ltorch_cuda")
    _run([*link, *map(str, objects), *libraries, "-o", str(folder / library.file)], log)
    for obj in objects:
        obj.unlink()


def max_jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isdigit() and int(value) > 0):
        raise BuildError(f"MAX_JOBS={value!r} is not a positive number", passing=True)
    return int(value) if value else len(os.sched_getaffinity(0))


def _publish(made: Path, target: Path) -> None:
    folder, digest = made.parent, made.with_suffix(DIGEST)
    digest.write_text(_digest(made.read_bytes()))
    for path in (made, digest, folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError:
        if not intact(target / made.name):  # else another process was faster, and its work is as good
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
        with _locked(root / f"{name}.lock") as alone:
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


def _build_into(folder: Path, target: Path, library: Library, compilers: list[Compiler], failed: Path) -> None:
    what, machine = f"the {library.kind} kernels", ", ".join(architectures()) if library == CUDA else capability()
    say(f"compiling {what} for {machine} with {compilers[-1]} into {target} (once for this machine and torch)")
    start = time.perf_counter()
    log: list[str] = []
    try:
        _compile(library, compilers, folder, log)
    except BuildError as error:
        log_path = failed.with_suffix(".log")
        log_path.write_text("\n".join(log))
        remedy = "mend that and run: python -m deepfast build"
        message = f"could not compile {what}: {error} (log: {log_path}); {remedy}"
        if not error.passing:
            failed.write_text(message)
        raise BuildError(message, passing=error.passing) from None
    folder.chmod(0o755)  # mkdtemp's is private; a shared cache is read by others
    _publish(folder / library.file, target)
    failed.unlink(missing_ok=True)
    say(f"compiled in {time.perf_counter() - start:.1f} s")


def build_all(root: Path | None = None) -> dict[Library, Path | BuildError]:
    """Compiles, into ``root`` (the cache), what can be compiled here; says what is left out, and why.

    For each library where it is, or what kept it from being made. What failed before is tried again. Without a GPU, the
    CUDA kernels are compiled for ``$TORCH_CUDA_ARCH_LIST``; a torch without CUDA leaves nothing out.
    """
    made: dict[Library, Path | BuildError] = {}
    for library in (CPU, COMM, *([CUDA] if torch.version.cuda else [])):
        try:
            found = find(library) if root is None else None
            made[library] = found or build(root, library, retry=True)
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


def load(library: Library = CPU) -> Path:
    """Finds or builds ``library`` and registers its operators as ``torch.ops.deepfast``.

    Raises:
        BuildError: if there is no library and none can be built.
    """
    path = locate(library)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _unloadable(path, error) from error
    return path


@functools.cache
def load_comm() -> Any:
    """Finds or builds the communication between ranks and imports it.

    Raises:
        BuildError: if there is none and none can be built.
    """
    path = locate(COMM)
    loader = importlib.machinery.ExtensionFileLoader("deepfast_comm", str(path))
    try:
        module = importlib.util.module_from_spec(
            importlib.machinery.ModuleSpec("deepfast_comm", loader, origin=str(path))
        )
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise _unloadable(path, error) from error
    return module


def _unloadable(path: Path, error: Exception) -> BuildError:
    return BuildError(f"{path} cannot be loaded: {error}; delete {path.parent} to compile it again")
