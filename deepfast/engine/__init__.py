"""A small DeepSpeed-style engine: mixed precision, loss scaling, accumulation, reduction, checkpoints.

Names are loaded when they are first used: a configuration can be read without any kernels.
"""

import importlib
from typing import Any

_HOME = {
    "Engine": "engine",
    "initialize": "initialization",
    "add_config_arguments": "initialization",
    "init_distributed": "ranks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deepfast.engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deepfast.engine.{_HOME[name]}"), name)
