"""The kernels compiled before they are needed: by `python -m deepfast build`, into a wheel, by torch's machinery."""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import compiler_that, python, run

from deepfast import build

USE = "import torch, deepfast.ops as o; print(o.LIBRARY); print(o.BUILD_ERROR)"


def test_prebuilt_and_installed(tmp_path, clone, quick):
    """An installed package compiles itself, or comes with its kernels; then it needs no compiler and no cache."""
    target = tmp_path / "site"
    done = run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
        "--target", target, clone,
        env={**quick, "DEEPFAST_PREBUILD": "1", "DEEPFAST_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (target / "deepfast" / "csrc" / "span.h").is_file()
    assert (target / "bin" / "ds_train.py").is_file()
    env = {"PYTHONPATH": str(target), "PATH": str(tmp_path), "DEEPFAST_CACHE_DIR": str(tmp_path / "empty")}
    done = python(USE, env=env, cwd=tmp_path)
    assert str(target / "deepfast" / "prebuilt") in done.stdout, done.stderr
    done = python("from deepfast import build; build.load_comm(); print(build.find(build.COMM))", env=env, cwd=tmp_path)
    assert str(target / "deepfast" / "prebuilt") in done.stdout, done.stderr
    shutil.rmtree(target / "deepfast" / "prebuilt")
    done = python(USE, env={**env, **quick, "PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert str(tmp_path / "empty") in done.stdout, done.stderr


MAKES_ALL = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done'
FAILS_AT = 'case "$*" in *{}*) echo "{}:1: fatal error: Python.h: No such file"; exit 255;; esac; ' + MAKES_ALL
CUDA_TORCH = """
import sys, torch
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: False
"""
AHEAD = {
    "python -m deepfast build": "from deepfast.__main__ import build_kernels; sys.exit(build_kernels())",
    "DEEPFAST_PREBUILD": "from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])",
}
NO_GPU = "without the CUDA kernels: no GPU to compile for: set TORCH_CUDA_ARCH_LIST"
NO_HEADER = "without the Comm kernels: could not compile the Comm kernels: comm.cpp:1: fatal error: Python.h"


def test_torchs_machinery_gets_what_it_needs_and_leaves_nothing_behind(tmp_path):
    """No ninja on the path, a compiler of several words, a relative folder with a space; what each is compiled with."""
    words = tmp_path / "words"
    cxx = compiler_that(tmp_path, f'echo a warning; echo "$@" >> {words}; {MAKES_ALL}')
    cache = tmp_path / "a cache"
    code = (
        "import os, sys, logging; from deepfast import build; from torch.utils import cpp_extension as torchs\n"
        "before = dict(os.environ), torchs.CUDA_HOME, torchs.TORCH_LIB_PATH; build.build()\n"
        "assert (dict(os.environ), torchs.CUDA_HOME, torchs.TORCH_LIB_PATH) == before\n"
        "assert logging.getLogger('torch.utils.cpp_extension').level == logging.NOTSET"
    )
    env = {"CXX": f"{cxx} -m64", "PATH": str(tmp_path), "CC": "none", "DEEPFAST_CACHE_DIR": cache.name,
           "DEEPFAST_BUILD_VERBOSE": "1"}  # fmt: skip
    done = python(code, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in cache.glob("*/*/*")} == {"libdeepfast_cpu.so", "libdeepfast_cpu.sha256"}
    assert done.stdout == "", "that is the program's"
    assert re.search(r"^\$ .* -c .*/step\.cpp .*\na warning$", done.stderr, re.MULTILINE)
    commands = {re.search(r"(\w+\.cpp|-shared)", line)[0]: line.split() for line in words.read_text().splitlines()}
    assert set(commands) == {*(Path(name).name for name in build.CPU.sources), "-shared"}
    for name, command in commands.items():
        assert command[0] == "-m64"
        assert (command[-1] == "-O1") == (name == "ops.cpp")
        if name != "-shared":
            assert {*build.cxx_flags(build.CPU), "-fPIC"} <= {*command}


def test_without_ninja_it_is_said_and_not_remembered(tmp_path):
    cache = tmp_path / "cache"
    env = {"CXX": compiler_that(tmp_path, MAKES_ALL), "PATH": str(tmp_path), "DEEPFAST_CACHE_DIR": str(cache)}
    done = python("import sys; sys.modules['ninja'] = None\n" + USE, env=env)
    assert (
        "could not compile the CPU kernels: Ninja is required to load C++ extensions (pip install ninja" in done.stderr
    )
    assert next(cache.glob("*.log")).is_file()
    assert not list(cache.glob("*.failed"))


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_nothing_older_is_put_into_a_wheel(tmp_path, clone, hook):
    """ninja takes another compiler for the same, by its name. (An editable install is the clone itself.)"""
    words = tmp_path / "words"
    env = {
        "CXX": compiler_that(tmp_path, f'echo a warning; echo "$@" >> {words}; {MAKES_ALL}'),
        "DEEPFAST_PREBUILD": "1",
    }
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    for times in (1, 2):
        done = run(sys.executable, "-c", code, tmp_path, env=env, cwd=clone)
        assert done.returncode == 0, done.stderr
        assert "a warning" not in done.stdout + done.stderr
        assert len(re.findall(r"/step\.cpp -o", words.read_text())) == times
    where = {"build_wheel": clone / "build", "build_editable": clone / "deepfast" / "prebuilt"}[hook]
    assert {path.name for path in where.rglob("*.so")} == {build.CPU.file, build.COMM.file}
    assert not list(clone.glob("*.so"))


@pytest.mark.parametrize("way", AHEAD)
@pytest.mark.parametrize(
    ("body", "gpus", "there", "said", "codes"),
    [
        (MAKES_ALL, "", {"cpu", "comm"}, NO_GPU, (0, 0)),
        (MAKES_ALL, "9.0", {"cpu", "comm", "cuda"}, "", (0, 0)),
        (FAILS_AT.format("comm.cpp", "comm.cpp"), "9.0", {"cpu", "cuda"}, NO_HEADER, (1, 0)),
        (FAILS_AT.format("cpu/step.cpp", "step.cpp"), "9.0", {"comm", "cuda"}, "could not compile the CPU", (1, 1)),
    ],
    ids=["no GPU", "GPUs named", "no headers of Python", "broken"],
)
def test_ahead_is_compiled_what_can_be(tmp_path, clone, way, body, gpus, there, said, codes):
    """By a torch with CUDA, where there is no GPU. The compilers only pretend."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in --version) echo "release 13.0,";; *) {MAKES_ALL};; esac\n')
    nvcc.chmod(0o755)
    (tmp_path / "wheel").mkdir()
    env = {"CXX": compiler_that(tmp_path, body), "CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": gpus,
           "DEEPFAST_PREBUILD": "1", "DEEPFAST_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    done = run(sys.executable, "-c", CUDA_TORCH + AHEAD[way], tmp_path / "wheel", env=env, cwd=clone)
    assert done.returncode == codes[list(AHEAD).index(way)], done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if not said:
        assert "without the" not in done.stderr
    wheels = list((tmp_path / "wheel").glob("*.whl"))
    names = zipfile.ZipFile(wheels[0]).namelist() if wheels else map(str, (tmp_path / "cache").rglob("*"))
    assert not any("none-any" in wheel.name for wheel in wheels), "it is for this platform"
    made = [Path(name).name for name in names if "/build-" not in name]
    if wheels or way != "DEEPFAST_PREBUILD":
        assert {name[12:-3] for name in made if name.endswith(".so")} == there
    assert not wheels or not any(name.endswith(".lock") for name in made)
