"""A small DeepSpeed-style engine: mixed precision, loss scaling, accumulation, reduction, checkpoints.

Names are loaded when they are first used: a configuration can be read without any kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepfast.engine.engine import Engine
    from deepfast.engine.initialization import add_config_arguments, initialize
    from deepfast.engine.ranks import init_distributed

__all__ = ["Engine", "add_config_arguments", "init_distributed", "initialize"]

_HOME = {
    "Engine": "engine",
    "initialize": "initialization",
    "add_config_arguments": "initialization",
    "init_distributed": "ranks",
}


if not TYPE_CHECKING:  # for a type checker there are the names above, and no others

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'deepfast.engine' has no attribute {name!r}")
        return getattr(importlib.import_module(f"deepfast.engine.{_HOME[name]}"), name)
