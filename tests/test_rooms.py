"""The house: who may call whom, how long a file may be, and that CONTRIBUTING.md describes it."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest
from cases import NAMES, OURS
from conftest import ROOT

import deepfast
from deepfast import optim
from deepfast.engine.config.schema import OptimizerParams
from deepfast.optimizers import OPTIMIZERS

# From the ground up: a room calls those beneath it. (comm and optim do not know each other.)
ROOMS = (
    "errors",
    "optimizers",
    "graphs",
    "build",
    "reference",
    "kernels",
    "ops",
    "comm",
    "optim",
    "functional",
    "scaler",
    "engine",
    "train",
    "deepspeed",
    "__main__",
)
PACKAGE = ROOT / "deepfast"
LONGEST = 400  # lines


def modules() -> dict[str, Path]:
    """deepfast.optim.adam and the like: where it lies. (kernels/ is a link, which rglob does not follow.)"""
    files = {path: path for path in PACKAGE.rglob("*.py")} | {
        PACKAGE / "kernels" / path.relative_to(ROOT / "kernels"): path for path in (ROOT / "kernels").rglob("*.py")
    }
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): there for path, there in files.items()}
    return {name.removesuffix(".__init__"): there for name, there in names.items()}


MODULES = modules()


def called(name: str) -> set[str]:
    """The modules that a module imports, at its top or within, for types, too."""
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found & MODULES.keys() - {name}


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES if name != "deepfast"} == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "deepfast"])
def test_nobody_calls_upwards(name):
    for other in called(name) - {"deepfast"}:
        assert ROOMS.index(room(other)) <= ROOMS.index(room(name)), f"{name} imports {other}"
        assert (room(name), room(other)) != ("optim", "comm"), f"{name} imports {other}"


def test_nobody_calls_in_a_circle():
    calls = {name: called(name) - {"deepfast"} for name in MODULES if name != "deepfast"}
    while calls:
        free = {name for name, others in calls.items() if not others & calls.keys()}
        assert free, f"a circle: {sorted(calls)}"
        calls = {name: others for name, others in calls.items() if name not in free}


def test_what_belongs_to_one_room_is_in_it():
    """A file in the top folder is called from at least two rooms; but for the command line, which nobody calls."""
    callers = defaultdict(set)
    for name in MODULES:
        for other in called(name):
            callers[room(other) if other != "deepfast" else ""].add(room(name) if name != "deepfast" else "deepfast")
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("__init__", "__main__", "functional", "scaler"):  # users call these two
            assert len(callers[path.stem] - {path.stem}) >= 2, path


def sources() -> list[Path]:
    folders = ("deepfast", "kernels", "csrc", "benchmarks", "tools", "tests", "examples")
    kinds = {".py", ".h", ".cpp", ".cu", ".cuh", ".c"}
    return [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_one_table_names_the_optimizers():
    assert set(optim.__all__) - {"Optimizer", "step_in_backward"} == set(OPTIMIZERS) <= set(deepfast.__all__)
    assert set(NAMES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_configuration_may_set_is_what_the_class_takes(name):
    settings = set(OPTIMIZERS[name].split())
    assert settings <= set(inspect.signature(OURS[name]).parameters)
    assert settings <= set(OptimizerParams.model_fields)


def test_the_guide_names_what_is_there():
    """Each file, folder and module that CONTRIBUTING.md names is there, and its rooms are in the order of ROOMS."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130, "two pages"
    quoted = re.findall(r"`([^`]+)`", text)
    paths = [path for span in quoted for path in span.split() if "/" in path and not path.startswith("-")]
    assert len(paths) > 50
    for path in paths:
        assert any(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/"))), path
    for name in (span for span in quoted if span.startswith("deepfast.")):
        assert name in MODULES, name
    listed = re.findall(r"`(?:deepfast/)?(\w+)(?:/|\.py)`", text[: text.index("## How a gradient travels")])
    assert [name for name in listed if name in ROOMS] == [name for name in ROOMS if name in listed]
    assert set(ROOMS) - {"__main__"} <= set(listed)
