"""What the tests share: the clone, and commands run in a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
