"""What scripts keep beside their weights (client_state), as JSON and back: no pickle is written, and none is read."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What JSON has no word for: {word: what plain() makes of it}.
_KINDS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "__tuple__": (tuple, list, tuple),
    "__set__": (set, list, set),
    "__bytes__": (bytes, bytes.hex, bytes.fromhex),
    "__path__": (PurePath, str, Path),
    "__namespace__": (argparse.Namespace, vars, lambda held: argparse.Namespace(**held)),
    "__datetime__": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "__dtype__": (torch.dtype, lambda t: str(t).removeprefix("torch."), lambda name: getattr(torch, name)),
    "__numpy__": (
        (np.ndarray, np.bool_, np.number),
        lambda a: [a.dtype.str, a.tolist()],
        lambda held: np.array(held[1], held[0])[()],
    ),
}


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it and ``restore`` brings it back: tuples, small tensors and any keys included.

    Raises:
        TypeError: for what only a pickle could hold.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: plain(v) for k, v in value.items()}
        return {"__dict__": [[plain(k), plain(v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    for word, (kind, to, _) in _KINDS.items():
        if isinstance(value, kind) and not (isinstance(value, np.ndarray) and value.dtype.hasobject):
            return {word: plain(to(value))}
    if isinstance(value, (bool, int, float, str)):  # of a class of its own
        return value
    raise TypeError(
        "a checkpoint holds no pickles: numbers, strings, tensors, arrays, lists, tuples, sets and dicts, not "
        f"{type(value).__name__}"
    )


def restore(value: Any) -> Any:
    """What ``plain`` was given."""
    if isinstance(value, list):
        return [restore(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__dict__" in value:
        return {restore(k): restore(v) for k, v in value["__dict__"]}
    if "__tensor__" in value:
        return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
    for word, (_, _, back) in _KINDS.items():
        if word in value:
            return back(restore(value[word]))
    return {k: restore(v) for k, v in value.items()}
