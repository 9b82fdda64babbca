"""A small DeepSpeed-style engine: mixed precision, loss scaling, accumulation, reduction, checkpoints.

Its names are :mod:`deepfast`'s, and are loaded when they are first used: a configuration can be read without kernels.
"""

from typing import Any

_NAMES = ("Engine", "add_config_arguments", "init_distributed", "initialize")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'deepfast.engine' has no attribute {name!r}")
    import deepfast

    return getattr(deepfast, name)
