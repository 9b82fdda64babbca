"""pyproject.toml says it all, but for two things.

The packages are found, so that none is forgotten: deepfast and all below it (in the clone, deepfast/kernels is a link
to kernels/), and the folders of csrc/, which hold no modules but what an installed package compiles itself from.

DEEPFAST_PREBUILD=1 compiles the kernels into the package (-v: and shows what could not be, and why):

    DEEPFAST_PREBUILD=1 pip install -v --no-build-isolation .

The sources, flags and names are those of the first import (deepfast/build), so the two cannot drift apart.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
PREBUILT = "deepfast/prebuilt"
PREBUILD = os.environ.get("DEEPFAST_PREBUILD", "")


class BuildAfresh(build_py):
    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, PREBUILT), ignore_errors=True)  # of an earlier build
        super().run()


def packages() -> list[str]:
    modules = find_packages(str(ROOT), include=["deepfast", "deepfast.*"])
    sources = find_namespace_packages(str(ROOT / "csrc"))
    return [*modules, "deepfast.csrc", *(f"deepfast.csrc.{name}" for name in sources)]


def setup_with_kernels(folder: Path) -> None:
    """Each library lands where the first import looks. The CPU's must; without the others it works, and says so."""
    sys.path.insert(0, str(ROOT))
    try:
        from deepfast import build
        from deepfast.build.machinery import machinery, reason
    except ModuleNotFoundError as error:
        raise SystemExit(f"DEEPFAST_PREBUILD={PREBUILD}: {error}: pip install --no-build-isolation") from error

    tools: list[build.Compiler] = []
    left_out: dict[str, build.BuildError] = {}
    places: dict[str, str] = {}
    for library in build.wanted():
        try:
            own, needed = build.toolchain(library)
        except build.BuildError as error:
            left_out[library.kind] = error
        else:
            tools = max(tools, needed, key=len)  # nvcc, too, where it is wanted and here
            places[library.kind] = f"{PREBUILT}/{build.interface_key(library)}/{own}/{library.file}"
    if build.CPU.kind in left_out:
        raise SystemExit(f"DEEPFAST_PREBUILD={PREBUILD}: {left_out[build.CPU.kind]}")

    with machinery(folder, tools) as cpp_extension:

        def extension(library: build.Library) -> Extension:
            # -g0: the flags that Python itself was compiled with come first, -g among them.
            options: dict[str, Any] = {
                "name": library.kind,
                "sources": [os.path.relpath(build.CSRC / name, ROOT) for name in library.sources],
                "extra_compile_args": {"cxx": [*build.cxx_flags(library), "-g0"]},
                "extra_link_args": [*build.link_flags(library)],
                "library_dirs": [str(folder)],
            }
            if library != build.CUDA:
                return cpp_extension.CppExtension(**options)
            options["extra_compile_args"]["nvcc"] = [*build.nvcc_flags(tools[0].program, build.architectures())]
            return cpp_extension.CUDAExtension(**options)

        build_ext: Any = cpp_extension.BuildExtension

        class Prebuild(build_ext):
            def run(self) -> None:
                for kind, error in left_out.items():
                    build.say(f"without the {kind} kernels: {error}")
                # Objects of an earlier build may be another compiler's: to ninja it is the same command.
                shutil.rmtree(self.build_temp, ignore_errors=True)
                super().run()

            def copy_extensions_to_source(self) -> None:
                """For an editable install, which is the clone itself."""
                shutil.copytree(Path(self.build_lib, PREBUILT), ROOT / PREBUILT, dirs_exist_ok=True)

            def get_ext_filename(self, kind: str) -> str:
                return places[kind]

            def build_extension(self, ext: Extension) -> None:
                try:
                    super().build_extension(ext)
                    build.seal(Path(self.get_ext_fullpath(ext.name)))
                except (RuntimeError, CompileError, LinkError) as error:
                    said = f"could not compile the {ext.name} kernels: {reason(folder, error)}"
                    if ext.name == build.CPU.kind:
                        raise SystemExit(f"DEEPFAST_PREBUILD={PREBUILD}: {said}") from error
                    build.say(f"without the {ext.name} kernels: {said}")

        made = [extension(library) for library in build.wanted() if library.kind in places]
        setup(packages=packages(), ext_modules=made, cmdclass={"build_py": BuildAfresh, "build_ext": Prebuild})


if PREBUILD in ("", "0"):
    setup(packages=packages(), cmdclass={"build_py": BuildAfresh})
else:
    with tempfile.TemporaryDirectory() as made_with:
        setup_with_kernels(Path(made_with))
