"""The README is true."""

from __future__ import annotations

import re
import sys

from conftest import ROOT, python

from deepfast import build
from deepfast.engine import config

sys.path.insert(0, str(ROOT / "tools"))

import readme

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_configuration_table_is_the_schemas():
    assert config.table() in README, "run: make readme"


def test_the_benchmarks_tables_are_the_results():
    assert readme.between(README, "benchmarks", readme.benchmarks()) == README, "run: make readme"
    assert "| AdamW, fp32, " in README


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = python(code)
    assert done.returncode == 0, done.stderr
    loss, norm = map(float, done.stdout.split())
    assert loss < 40  # from about 64, the variance of a sum of 64
    assert norm > 0


def test_every_environment_variable_is_listed():
    read = set()
    for path in (*(ROOT / "deepfast").rglob("*.py"), ROOT / "setup.py"):
        read |= set(re.findall(r"DEEPFAST_[A-Z_]+", path.read_text(encoding="utf-8")))
    assert read == set(re.findall(r"`(DEEPFAST_[A-Z_]+)`", README))


def test_the_files_it_counts_are_the_files_there_are():
    listed = {library: [*library.kernels, *library.bindings] for library in (build.CPU, build.CUDA, build.COMM)}
    assert [len(names) for names in listed.values()] == [5, 8, 5], (
        "five for the CPU, eight for CUDA, five between ranks"
    )
    there = [p for suffix in ("*.cpp", "*.cu") for p in build.CSRC.rglob(suffix)]
    found = sorted(str(p.relative_to(build.CSRC)) for p in there)
    assert sorted({name for names in listed.values() for name in names}) == found
