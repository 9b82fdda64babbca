"""The build: compiled once, whatever happens in the middle of it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, SITE, TESTS, compiler_that, python, run

from deepfast import build

pytestmark = pytest.mark.xdist_group("build")  # they share a cache, and compile: one after the other

USE = "import torch, deepfast.ops as o; print(o.LIBRARY); print(o.BUILD_ERROR)"
STEP = """
import torch, deepfast
p = torch.nn.Parameter(torch.ones(10)); p.grad = torch.ones(10)
deepfast.AdamW([p], lr=0.1).step()
print(p[0].item())
"""


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*/libdeepfast_cpu.so"))


def start(cache: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE],
        env={**os.environ, "DEEPFAST_CACHE_DIR": str(cache), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache filled by four processes at once: one compiles, three wait, all load."""
    cache = tmp_path_factory.mktemp("cache")
    processes = [start(cache) for _ in range(4)]
    results = [p.communicate(timeout=HANGS) for p in processes]
    assert [p.returncode for p in processes] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    assert sum("compiled in" in err for _, err in results) == 1, results
    assert len(libraries(cache)) == 1
    assert not list(cache.glob("*.build-*"))
    return cache


def test_four_processes_at_once_compile_once(built):
    assert libraries(built)


def test_two_lines_on_stderr_and_none_from_the_cache(tmp_path, built, quick):
    done = python(USE, env={**quick, "DEEPFAST_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": "avx2"})
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("deepfast: compiling the CPU kernels")
    assert str(tmp_path) in lines[0]
    assert lines[1].startswith("deepfast: compiled in")
    assert python(USE, env={"DEEPFAST_CACHE_DIR": str(built)}).stderr == ""


def test_kill_9_in_the_middle_of_a_build(tmp_path):
    """A lock that outlives its process hangs the next one."""
    victim = start(tmp_path)
    deadline = time.monotonic() + HANGS
    while not list(tmp_path.glob("*.build-*")):
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not libraries(tmp_path)
    assert list(tmp_path.glob("*.build-*"))
    done = python(USE, env={"DEEPFAST_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0
    assert str(tmp_path) in done.stdout, done.stderr
    assert not list(tmp_path.glob("*.build-*")), "what the killed one left is gone"


def as_mere_mortal() -> None:
    """Root ignores permissions; without these two capabilities it does not."""
    import ctypes

    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("filled", [True, False])
def test_read_only_cache(tmp_path, built, quick, filled):
    cache, tmp = tmp_path / "cache", tmp_path / "tmp"
    env = {"DEEPFAST_CACHE_DIR": str(cache), "TMPDIR": str(tmp), **({} if filled else quick)}
    tmp.mkdir()
    if filled:
        shutil.copytree(built, cache)
    else:
        cache.mkdir()
    for folder in (cache, *(p for p in cache.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    try:
        done = python(USE, env=env, preexec_fn=as_mere_mortal)
    finally:
        cache.chmod(0o755)
        for folder in cache.rglob("*"):
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert str(cache if filled else tmp) in done.stdout.splitlines()[0], done.stderr
    assert bool(libraries(tmp / f"deepfast-{os.getuid()}")) != filled


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").touch()
    env = {"DEEPFAST_CACHE_DIR": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path), "HOME": "/nonexistent"}
    (tmp_path / f"deepfast-{os.getuid()}").touch()  # somebody else's, and no folder
    done = python(STEP, env=env)
    assert done.returncode == 0, done.stderr
    assert "set DEEPFAST_CACHE_DIR to a folder that can" in done.stderr


def test_no_compiler_at_all(tmp_path, built):
    env = {"PATH": str(tmp_path), "DEEPFAST_CACHE_DIR": str(tmp_path / "cache")}
    done = python(STEP, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.899)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "no C++ compiler found" in done.stderr
    assert "apt install g++" in done.stderr
    forced = python(STEP, env={**env, "DEEPFAST_BACKEND": "cpu"})
    assert forced.returncode != 0
    assert "backend='cpu' was asked for, but no C++ compiler" in forced.stderr
    # A cache that a machine with a compiler has filled serves one without.
    done = python(USE, env={"PATH": str(tmp_path), "DEEPFAST_CACHE_DIR": str(built)})
    assert str(built) in done.stdout, done.stderr


def test_a_source_error_is_shown_and_remembered(tmp_path, clone, quick):
    source = clone / "csrc" / "cpu" / "accumulate.cpp"
    source.write_text(source.read_text().replace("float weight", "flot weight"))
    cache = tmp_path / "cache"
    env = {**quick, "DEEPFAST_CACHE_DIR": str(cache), "PYTHONPATH": str(clone)}
    first = python(STEP, env=env, cwd=clone)
    assert first.returncode == 0, first.stderr  # the reference runs
    assert "accumulate.cpp:" in first.stderr
    assert "error: " in first.stderr
    assert "flot" in first.stderr
    log = next(cache.glob("*.log"))
    assert str(log) in first.stderr
    assert "flot" in log.read_text()
    assert "python -m deepfast build" in first.stderr
    second = python(STEP, env=env, cwd=clone)
    assert "flot" in second.stderr
    assert "compiling" not in second.stderr, "it is known to fail"
    again = run(sys.executable, "-m", "deepfast", "build", env=env, cwd=clone)
    assert again.returncode == 1
    assert "compiling" in again.stderr, "asked to, it tries again"
    assert "Traceback" not in again.stderr


def test_file_systems_without_locks(tmp_path, quick):
    """Two builds at once may then do the same work twice, but must not touch each other's."""
    code = (
        "import errno, time, filelock\n"
        "def refuse(*_, **__): raise OSError(errno.ENOLCK, 'no locks')\n"
        "filelock.FileLock.acquire = refuse\n" + USE
    )
    processes = []
    for _ in range(2):
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, **quick, "DEEPFAST_CACHE_DIR": str(tmp_path)}, cwd=TESTS)
        )  # fmt: skip
        time.sleep(3)
    for p in processes:
        out, err = p.communicate(timeout=HANGS)
        assert str(tmp_path) in out, err
    assert len(libraries(tmp_path)) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [("kill -9 $$", "killed by signal 9"), ("echo 'x.s: No space left on device'; exit 1", "No space left")],
)
def test_a_killed_compiler_or_a_full_disk_is_not_remembered(tmp_path, body, says):
    env = {"CXX": compiler_that(tmp_path, body), "DEEPFAST_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        done = python(USE, env=env)
        assert says in done.stderr
        assert "compiling" in done.stderr
    assert not list((tmp_path / "cache").glob("*.failed"))


def test_two_instruction_sets_in_one_cache(tmp_path, quick):
    """On a shared home, each machine must find its own."""
    for capability in ("avx2", "default"):
        env = {**quick, "DEEPFAST_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = python(STEP, env=env)
        assert float(done.stdout) == pytest.approx(0.899), done.stderr
    names = {p.parent.parent.name for p in libraries(tmp_path)}
    assert {name.split("-")[1] for name in names} in ({"avx2", "default"}, {"default"})


def test_a_damaged_library_is_compiled_again(tmp_path, built):
    shutil.copytree(built, tmp_path / "cache")
    library = libraries(tmp_path / "cache")[0]
    library.write_bytes(library.read_bytes()[:5000])
    done = python(STEP, env={"DEEPFAST_CACHE_DIR": str(tmp_path / "cache")})
    assert "compiled in" in done.stderr
    assert float(done.stdout) == pytest.approx(0.899)


def test_a_torch_whose_path_holds_a_space(tmp_path):
    import torch

    folder = tmp_path / "with a space"
    folder.mkdir()
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    env = {"DEEPFAST_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{folder}{os.pathsep}{SITE}"}
    done = python("import torch; print(torch.__file__)\n" + USE, env=env)
    where, library, why_not = done.stdout.splitlines()
    assert where.startswith(str(folder))
    assert library.startswith(str(folder)), why_not


def test_jit_can_be_forbidden(tmp_path, built):
    done = python(USE, env={"DEEPFAST_CACHE_DIR": str(tmp_path), "DEEPFAST_DISABLE_JIT": "1"})
    assert "DEEPFAST_DISABLE_JIT" in done.stderr
    assert not libraries(tmp_path)
    done = python(USE, env={"DEEPFAST_CACHE_DIR": str(built), "DEEPFAST_DISABLE_JIT": "1"})
    assert str(built) in done.stdout


def test_the_key_holds_all_that_matters(monkeypatch):
    import torch

    def key() -> str:
        build.interface_key.cache_clear()
        return build.interface_key()

    keys = [key()]
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    keys.append(key())
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    keys.append(key())
    for flags in ("KERNEL_FLAGS", "BINDING_FLAGS", "LINK_FLAGS"):
        monkeypatch.setattr(build.libraries, flags, (*getattr(build.libraries, flags), "-DX"))
        keys.append(key())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert key() == keys[0]
    assert build.compiler_key(build.Compiler(("g++",), "12")) != build.compiler_key(build.Compiler(("g++",), "13"))


def test_each_arm_cpu_has_its_own_library(monkeypatch, tmp_path):
    """They share a name (aarch64) and a home, and torch tells few of them apart; -mcpu=native does."""
    import torch

    def key() -> str:
        build.interface_key.cache_clear()
        return build.interface_key()

    def flags() -> tuple[str, ...]:
        return build.cxx_flags(build.CPU)

    before = key()
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    elsewhere = key()
    monkeypatch.setattr(build.targets, "CPUINFO", tmp_path / "cpuinfo")
    assert key() == elsewhere, "there the CPU's description decides nothing"
    assert "-mcpu=native" not in flags()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    keys = [key()]  # without the file
    core = "processor\t: {}\nBogoMIPS\t: {}\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"
    for said in (("fp asimd", "0xd0c"), ("fp asimd sve", "0xd0c"), ("fp asimd sve", "0xd40")):
        build.targets.CPUINFO.write_text(core.format(0, "50.00", *said) + core.format(1, "50.00", *said))
        keys.append(key())
    assert len(set(keys)) == len(keys)
    build.targets.CPUINFO.write_text(core.format(0, "48.00", *said))  # fewer cores of the same kind, another clock
    assert key() == keys[-1]
    assert "-mcpu=native" in flags()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "-mcpu=native" not in flags()
    monkeypatch.undo()
    assert key() == before


def test_import_is_lazy():
    done = python(
        "import sys, deepfast; assert 'torch' not in sys.modules; import torch; before = set(sys.modules);"
        "deepfast.AdamW; new = set(sys.modules) - before; assert 'deepfast.ops' in new;"
        "print([m for m in new if 'cpp_extension' in m"
        " or m.startswith(('pydantic', 'numpy', 'transformers', 'ninja', 'filelock'))])"
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert python("import deepfast; deepfast.nonsense").stderr.strip().endswith("has no attribute 'nonsense'")


def test_max_jobs_is_honoured(tmp_path):
    done = python(USE, env={"DEEPFAST_CACHE_DIR": str(tmp_path), "MAX_JOBS": "none"})
    assert "MAX_JOBS='none' is not a positive number" in done.stderr


def test_doctor(tmp_path):
    done = run(sys.executable, "-m", "deepfast", "doctor")
    assert done.returncode == 0, done.stderr
    assert "on a CPU       compiled kernels" in done.stdout
    assert re.search("^communication +(/|not compiled yet)", done.stdout, re.MULTILINE)
    done = run(sys.executable, "-m", "deepfast", "doctor", env={"PATH": "/nonexistent", "DEEPFAST_CACHE_DIR": tmp_path})
    assert done.returncode == 1
    assert "none: install g++ or set CXX" in done.stdout
    assert "on a CPU       the reference" in done.stdout
    assert done.stderr == ""
    done = run(sys.executable, "-m", "deepfast", "doctor", env={"DEEPFAST_BACKEND": "tpu"})
    assert done.returncode == 1
    assert "unknown backend 'tpu'" in done.stdout


@pytest.mark.parametrize(
    ("backend", "code", "cpu", "gpu"),
    [
        ("", 0, "compiled kernels", ""),
        ("cpu", 0, "compiled kernels", "nothing: "),
        ("reference", 0, "the reference", "the reference"),
        ("cuda", 1, "nothing: .*the parameter lies on cpu", ""),
        ("triton", 1, "nothing: .*the parameter lies on cpu", ""),
    ],
)
def test_the_doctor_says_what_would_run(backend, code, cpu, gpu):
    settings = {"DEEPFAST_BACKEND": backend, "TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, "-m", "deepfast", "doctor", env=settings)
    assert done.returncode == code
    assert re.search(f"^on a CPU +{cpu}", done.stdout, re.MULTILINE), done.stdout
    assert re.search(f"^on a GPU +{gpu}", done.stdout, re.MULTILINE), done.stdout
    step = """
import torch, deepfast
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
deepfast.SGD([p], lr=1.0).step()
"""
    assert python(step, env=settings).returncode == code


def test_the_doctor_says_what_failed_before(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\ncase $* in *-c*) echo 'error: no, not this'; exit 1;; esac\nexec g++ \"$@\"\n")
    compiler.chmod(0o755)
    settings = {"DEEPFAST_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    assert (
        "error: no, not this"
        in python("from deepfast import build; build.build(library=build.COMM)", env=settings).stderr
    )
    done = run(sys.executable, "-m", "deepfast", "doctor", env=settings)
    assert re.search("^communication +none: could not compile .*error: no, not this", done.stdout, re.MULTILINE)


def test_a_compiler_that_links_its_own_cxx_library_in(tmp_path):
    """Messages keep their numbers, though torch's C++ library is another one."""
    code = (
        "import torch, deepfast.ops as ops; none = torch.tensor([], dtype=torch.int32)\n"
        "ops.native.Plan('sgd', [], [], [], [], none).gather([None, None], False)"
    )
    done = python(code, env={"DEEPFAST_CACHE_DIR": str(tmp_path), "CXX": "g++ -static-libstdc++"})
    assert "compiled in" in done.stderr
    assert "0 tensors of gradients expected, got 2" in done.stderr
