"""What the tests share: the clone, and commands run in a clean environment."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import on_host
import pytest
from on_host import played_cuda

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
HANGS = 900  # seconds: what takes so long, even on a machine ten times slower than another, will not end
# What is tested is the deepfast that is found here: the clone's, or that of an installed wheel (`make test`). All that
# the tests start finds the same one, and so nothing starts where Python would find the clone by itself.
SITE = Path(importlib.util.find_spec("deepfast").origin).resolve().parents[1]
TRAIN = (ROOT if SITE == ROOT else SITE / "bin") / "ds_train.py"
_NAMED = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
for _folder in _NAMED:
    if Path(_folder, "deepfast").is_dir():
        if Path(_folder).resolve() != SITE:
            raise pytest.UsageError(
                f"PYTHONPATH names {_folder}, but {SITE} was found first: run pytest, not python -m"
            )
        break
os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *_NAMED])


def pytest_report_header() -> str:
    return f"deepfast: {SITE}"


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Kernels are compiled once, before anything is measured or killed; and they must compile."""
    from deepfast import ops

    assert ops.LIBRARY is not None, ops.BUILD_ERROR


def run(*command: object, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns it with its output, whatever its exit code. An env value of "" unsets a variable."""
    merged = {**os.environ, **(env or {})}
    merged = {k: v for k, v in merged.items() if v != ""}
    options.setdefault("timeout", HANGS)
    options.setdefault("cwd", TESTS)
    return subprocess.run([str(c) for c in command], env=merged, capture_output=True, text=True, check=False, **options)


def python(code: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, env=env, **options)


def shared_folder(tmp_path_factory, name: str) -> Path:
    """The same folder for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> dict[str, str]:
    """With this, a build whose sources and flags another one had takes a second: see compiled_before.py."""
    from deepfast import build

    command = [sys.executable, TESTS / "compiled_before.py", shared_folder(tmp_path_factory, "objects")]
    return {"CXX": shlex.join([*map(str, command), *build.compiler().command])}


@pytest.fixture
def clone(tmp_path) -> Path:
    """The sources, to be spoilt or installed."""
    for name in ("deepfast", "csrc", "kernels"):
        shutil.copytree(
            ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__", "prebuilt")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ds_train.py"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    return tmp_path / "clone"


def compiler_that(tmp_path: Path, body: str) -> str:
    """A C++ compiler that has a version, and else does what is said in shell."""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-dumpversion*) echo 12;; *) {body};; esac\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="session")
def host_builds(tmp_path_factory) -> Path:
    """Where the CUDA kernels lie that are compiled for the host, once for all workers."""
    if "DEEPFAST_PLAYED" in os.environ:  # a rehearsal of the session on a GPU has them loaded
        return Path(os.environ["DEEPFAST_PLAYED"])
    return shared_folder(tmp_path_factory, "on_host")


@pytest.fixture(scope="session")
def cuda_on_host(host_builds) -> SimpleNamespace:
    """The CUDA backend, its kernels run on the host, for CPU tensors."""
    library = on_host.backend(host_builds)
    return SimpleNamespace(file=library, **vars(played_cuda(library)))


@pytest.fixture(scope="session")
def harness(host_builds) -> Path:
    """tests/harness.cu for the host."""
    return on_host.program(host_builds, "harness")


@pytest.fixture(scope="session")
def ranks(host_builds) -> Path:
    """tests/ranks.cu for the host."""
    return on_host.program(host_builds, "ranks")


@pytest.fixture(scope="session")
def triton_dry(tmp_path_factory) -> Path:
    """Where tests/triton_dry/play.py keeps what it compiles."""
    return shared_folder(tmp_path_factory, "triton_dry")


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with text, and a one-layer GPT-2 with dropout."""
    from runs import furnished

    return furnished(tmp_path)


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


def pytest_runtest_logfinish() -> None:
    """After a CUDA error nothing works in its process: a worker ends, and pytest-xdist starts another."""
    import torch

    if not torch.cuda.is_initialized() or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"this worker ends: {error}", file=sys.stderr, flush=True)
        os._exit(3)  # taking down a broken context may hang
