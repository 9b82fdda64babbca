"""What the tests share: the clone, and commands run in a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Kernels are compiled once, before anything is measured or killed; and they must compile."""
    from deepfast import ops

    assert ops.LIBRARY is not None, ops.BUILD_ERROR


def run(*command: object, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns it with its output, whatever its exit code. An env value of "" unsets a variable."""
    merged = {**os.environ, **(env or {})}
    merged = {k: v for k, v in merged.items() if v != ""}
    options.setdefault("timeout", 240)
    options.setdefault("cwd", ROOT)
    return subprocess.run([str(c) for c in command], env=merged, capture_output=True, text=True, check=False, **options)


def python(code: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, env=env, **options)


def compile_all(out: Path, commands: dict[Path, list], compiler: tuple[str, ...], options: list) -> Path:
    """Runs the commands (object -> command but for its ``-o``) two at a time, then links; once for all workers."""
    from concurrent.futures import ThreadPoolExecutor

    folder = out.parent
    with FileLock(f"{folder}.lock"):
        if not out.exists():
            folder.mkdir(exist_ok=True)
            with ThreadPoolExecutor(2) as pool:
                for done in pool.map(lambda item: run(*item[1], "-o", item[0]), commands.items()):
                    assert done.returncode == 0, done.stderr
            done = run(*compiler, *commands, *options, "-o", out)
            assert done.returncode == 0, done.stderr
    return out


def shared_folder(tmp_path_factory, name: str) -> Path:
    """The same folder for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name


ON_HOST = ROOT / "tests/cuda_on_host"


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory) -> SimpleNamespace:
    """The CUDA backend, its kernels run on the host, for CPU tensors."""
    import torch

    from deepfast import build

    cxx = build.compiler()
    assert cxx is not None
    folder = shared_folder(tmp_path_factory, "cuda_on_host")
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-w", "-I", ON_HOST, "-x", "c++", "-c"]
    sources = [build.CSRC / name for name in build.CUDA.kernels] + [ON_HOST / "threads.cpp"]
    commands = {folder / f"{path.stem}.o": [*cxx.command, "-O2", *flags, path] for path in sources}
    commands[folder / "ops.o"] = [*cxx.command, "-O1", *flags, ON_HOST / "ops.cpp", "-isystem", root / "include"]
    options = ["-shared", "-fopenmp", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = compile_all(folder / "on_host.so", commands, cxx.command, options)
    return SimpleNamespace(library=library, **vars(played_cuda(library)))


def played_cuda(library: Path) -> SimpleNamespace:
    """The backend in a library that :func:`cuda_on_host` has compiled."""
    import torch

    torch.ops.load_library(library)
    names = ("statistics", "decide_", "step_", "accumulate_", "scaler_update_", "collective_", "peer_layout",
             "launches", "capture")  # fmt: skip
    operators = {name: getattr(torch.ops.deepfast_cuda_on_host, name) for name in names}
    return SimpleNamespace(Plan=torch.classes.deepfast_cuda_on_host.Plan, **operators)


@pytest.fixture(autouse=True)
def _on_device():
    """Tests that make their tensors without saying where run on a GPU where DEEPFAST_TEST_DEVICE says so."""
    import torch
    from cases import DEVICE

    if DEVICE == "cpu":
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _play_cuda(request, monkeypatch) -> None:
    """``backend="cuda"`` on a CPU is the CUDA backend on the host, in tests that are given that backend."""
    from cases import DEVICE

    callspec = getattr(request.node, "callspec", None)
    if (
        DEVICE != "cpu"
        or request.node.get_closest_marker("gpu")
        or callspec is None
        or callspec.params.get("backend") != "cuda"
    ):
        return
    from deepfast import ops

    played = request.getfixturevalue("cuda_on_host")
    named = ops._named
    monkeypatch.setattr(ops, "_named", lambda name, device: played if name == "cuda" else named(name, device))
