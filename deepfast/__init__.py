"""deepfast: the whole optimizer step in one pass over memory.

Names are loaded when they are first used: ``import deepfast`` itself costs next to nothing and compiles nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deepfast.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from deepfast import functional
    from deepfast.engine.engine import Engine
    from deepfast.engine.initialization import add_config_arguments, initialize
    from deepfast.engine.ranks import init_distributed
    from deepfast.optim import LAMB, SGD, Adagrad, Adam, AdamW, Lion, step_in_backward
    from deepfast.scaler import LossScaler

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys((*OPTIMIZERS, "step_in_backward"), "deepfast.optim"),
    "LossScaler": "deepfast.scaler",
    **dict.fromkeys(("Engine", "initialize", "add_config_arguments", "init_distributed"), "deepfast.engine"),
}
__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Engine",
    "Lion",
    "LossScaler",
    "add_config_arguments",
    "functional",
    "init_distributed",
    "initialize",
    "step_in_backward",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")  # deepfast.optim, deepfast.ops, …
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module 'deepfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
