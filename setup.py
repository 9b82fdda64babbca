"""pyproject.toml says it all, but for this: DEEPFAST_PREBUILD=1 compiles the kernels into the package.

    DEEPFAST_PREBUILD=1 pip install --no-build-isolation .

The sources, flags and names are those of the first import (deepfast/build.py), so the two cannot drift apart.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    def run(self) -> None:
        prebuilt = Path(self.build_lib) / "deepfast" / "prebuilt"
        shutil.rmtree(prebuilt, ignore_errors=True)  # of an earlier build in the same folder
        super().run()
        if os.environ.get("DEEPFAST_PREBUILD", "0") in ("", "0"):
            return
        sys.path.insert(0, str(Path(__file__).parent))
        import torch

        from deepfast import build

        build.build(prebuilt)
        if torch.version.cuda and not isinstance(build.nvcc(), str):
            build.build(prebuilt, build.CUDA)  # for $TORCH_CUDA_ARCH_LIST, or the GPUs here


setup(cmdclass={"build_py": BuildWithKernels})
