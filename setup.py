"""pyproject.toml says it all, but for two things.

The packages are found, so that none is forgotten: deepfast and all below it (in the clone, deepfast/kernels is a link
to kernels/), and the folders of csrc/, which hold no modules but what an installed package compiles itself from.

DEEPFAST_PREBUILD=1 compiles the kernels into the package (-v: and shows what could not be, and why):

    DEEPFAST_PREBUILD=1 pip install -v --no-build-isolation .

The sources, flags and names are those of the first import (deepfast/build.py), so the two cannot drift apart.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithKernels(build_py):
    def run(self) -> None:
        prebuilt = Path(self.build_lib) / "deepfast" / "prebuilt"
        shutil.rmtree(prebuilt, ignore_errors=True)  # of an earlier build in the same folder
        super().run()
        if os.environ.get("DEEPFAST_PREBUILD", "0") in ("", "0"):
            return
        sys.path.insert(0, str(ROOT))
        from deepfast import build

        made = build.build_all(prebuilt)
        for lock in prebuilt.glob("*.lock"):
            lock.unlink()
        if isinstance(made[build.CPU], build.BuildError):
            raise SystemExit(f"DEEPFAST_PREBUILD={os.environ['DEEPFAST_PREBUILD']}: {made[build.CPU]}")


def packages() -> list[str]:
    modules = find_packages(str(ROOT), include=["deepfast", "deepfast.*"])
    sources = find_namespace_packages(str(ROOT / "csrc"))
    return [*modules, "deepfast.csrc", *(f"deepfast.csrc.{name}" for name in sources)]


setup(cmdclass={"build_py": BuildWithKernels}, packages=packages())
