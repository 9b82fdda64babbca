"""deepfast: the whole optimizer step in one pass over memory.

Names are loaded when they are first used: ``import deepfast`` itself costs next to nothing and compiles nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deepfast.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from deepfast import comm as comm
    from deepfast import deepspeed as deepspeed
    from deepfast import engine as engine
    from deepfast import errors as errors
    from deepfast import functional as functional
    from deepfast import ops as ops
    from deepfast import optim as optim
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


if not TYPE_CHECKING:  # for a type checker there are the names above, and no others

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        try:
            return importlib.import_module(f"{__name__}.{name}")  # deepfast.optim, deepfast.ops, …
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        raise AttributeError(f"module 'deepfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    dunders = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *dunders, "comm", "engine", "errors", "ops", "optim"})
