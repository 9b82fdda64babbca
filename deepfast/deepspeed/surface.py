"""Modules named ``deepspeed…`` that hold what ``names.py`` lists, each name loaded when it is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import deepfast
from deepfast.deepspeed import names as listed
from deepfast.deepspeed.names import INSTEAD, NAMES

# The DeepSpeed whose names these are (scripts compare it), and who has them.
VERSION = f"0.19.8+deepfast.{deepfast.__version__}"


def _entries(path: str) -> Iterator[tuple[str, str, str]]:
    """(name, its module here, its name there) of all that the module ``path`` has."""
    for home, names in NAMES.get(path, {}).items():
        for entry in names.split():
            name, _, own = entry.partition("=")
            yield name, home, own or name


def names(path: str) -> list[str]:
    return [name for name, _, _ in _entries(path)]


def find(path: str, name: str) -> Any:
    """What the module ``path`` has as ``name``.

    Raises:
        AttributeError: says what to do, where DeepSpeed may have it and this package does not.
    """
    for known, home, own in _entries(path):
        if known == name:
            return getattr(importlib.import_module(home), own)
    raise AttributeError(missing(f"{path}.{name}"))


def missing(name: str) -> str:
    """The line for a name that is not there."""
    fits = [begin for begin in INSTEAD if name.startswith(begin)]
    return f"deepfast has no {name}: {INSTEAD[max(fits, key=len)]}"


class Surface(ModuleType):
    """One of those modules."""

    def __getattr__(self, name: str) -> Any:
        return find(self.__name__, name)

    def __dir__(self) -> list[str]:
        return sorted([*vars(self), *names(self.__name__)])


class Missing:
    """Answers for modules that are not there, and so for names: ``from package import name`` asks for both."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        public = fullname.removeprefix("deepfast.")
        if not public.startswith("deepspeed."):
            return None
        if fullname != public and PathFinder.find_spec(fullname, path) is not None:
            return None  # a file of this package
        raise ModuleNotFoundError(missing(public))


def register(package: ModuleType) -> None:
    """Makes ``package`` the process's ``deepspeed``, and its submodules ``deepspeed.…``.

    Raises:
        ImportError: if another ``deepspeed`` is imported.
    """
    other = sys.modules.get("deepspeed")
    if other is not None:
        where = getattr(other, "__file__", None)
        raise ImportError(f"another deepspeed is imported already ({where}): import deepfast.deepspeed instead of it")
    sys.modules["deepspeed"] = package
    paths = {".".join(parts[:n]) for parts in (path.split(".") for path in NAMES) for n in range(2, len(parts) + 1)}
    for path in sorted(paths):
        module = Surface(path)
        module.__spec__ = ModuleSpec(path, None, is_package=True)
        module.__path__, module.__file__ = [], listed.__file__
        sys.modules[path] = sys.modules[f"deepfast.{path}"] = module
        parent, _, last = path.rpartition(".")
        setattr(sys.modules[parent], last, module)
    sys.meta_path.insert(0, Missing())
