"""Options beyond torch's: of an optimizer, not of its groups.

Frameworks make an optimizer anew in two ways, ``type(o)(o.param_groups)`` and ``type(o)(params, **o.defaults)``, and no
option may be lost on either. So ``defaults`` has those that are not the usual ones: where none is asked for it is
torch's to the key. The groups have none, so that nothing stands in a state_dict that torch does not know, nor where
changing it would have no effect; whose they are is found out. (Dictionaries of a class of our own could say so
themselves, but a group is the very dictionary that the user has given, and torch.compile takes plain ones only.)
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection
from typing import Any, Generic, Literal, TypedDict, TypeVar, cast

import torch

from deepfast import ops

Master = Literal["auto", "split", "fp32", "none"]
Form = Literal["fp32", "bf16", "param", "int8"]
Rounding = Literal["nearest", "stochastic"]
Backend = Literal["auto", "cpu", "cuda", "triton", "reference"]


class Asked(TypedDict, total=False):
    """What an optimizer takes beside torch's arguments; :class:`deepfast.optim.Optimizer` describes it."""

    master: Master
    state_dtype: Form | dict[str, Form]
    rounding: Rounding
    seed: int
    max_grad_norm: float | None
    reset_grad: bool
    backend: Backend


MASTERS = {"auto": torch.int16, "split": torch.int16, "fp32": torch.float32, "none": None}
"""How a master is kept: in full, or as what the 16-bit parameter lacks of it."""

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "param": None, "int8": torch.int8}
"""How a moment is kept; None: as its parameter. In 8 bits, one that is never negative is torch.uint8."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The usual ones; ValueError for those that make no sense. :class:`deepfast.optim.Optimizer` describes them."""

    master: str = "auto"
    state_dtype: str | dict[str, str] = "fp32"
    rounding: str = "nearest"
    seed: int = 0
    max_grad_norm: float | None = None
    reset_grad: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        moments = self.state_dtype.values() if isinstance(self.state_dtype, dict) else (self.state_dtype,)
        _choose("master", self.master, MASTERS, ("split8",))
        for form in moments:
            _choose("state_dtype", form, MOMENTS)
        _choose("rounding", self.rounding, ("nearest", "stochastic"))
        if not isinstance(self.seed, int):
            raise TypeError(f"deepfast: seed must be an integer, got {self.seed!r}")
        if self.reset_grad not in (True, False):
            raise TypeError(f"deepfast: reset_grad must be True or False, got {self.reset_grad!r}")
        if self.rounding == "stochastic" and self.master != "none":
            raise ValueError("deepfast: rounding='stochastic' is for weights without a master: give master='none', too")
        if not (self.max_grad_norm is None or hasattr(self.max_grad_norm, "__float__")):
            raise TypeError(f"deepfast: max_grad_norm must be a number or None, got {self.max_grad_norm!r}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"deepfast: max_grad_norm must be positive, got {self.max_grad_norm}")
        ops.forced(self.backend)


def _choose(option: str, value: Any, known: Collection[str], later: Collection[str] = ()) -> None:
    if not isinstance(value, str) or value not in known:
        verdict = "is not built yet" if isinstance(value, str) and value in later else "is not known"
        raise ValueError(f"deepfast: {option}={value!r} {verdict}: choose one of {', '.join(known)}")


NAMES = tuple(field.name for field in dataclasses.fields(Options))


ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()
"""All optimizers."""


def asked_for(params: Any, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` and, where ``params`` are the groups of another optimizer, what was asked of that one."""
    unknown = given.keys() - set(NAMES)
    if unknown:
        raise TypeError(f"deepfast: unknown option {min(unknown)!r}: there are {', '.join(NAMES)}")
    options = vars(Options(**{**_inherited(params), **given}))
    return {name: value for name, value in options.items() if value != getattr(Options, name)}


def _inherited(params: Any) -> dict[str, Any]:
    first = params[0] if isinstance(params, (list, tuple)) and params else None
    if not isinstance(first, dict) or "lr" not in first:
        return {}
    for optimizer in ALIVE:
        if any(first is group for group in optimizer.param_groups):
            return {k: v for k, v in optimizer.defaults.items() if k in NAMES}
    return {}


T = TypeVar("T")


class Option(Generic[T]):
    """One of them as an attribute of the optimizer. It may be set, too."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> T:
        value = getattr(Options, self._name)
        if optimizer is not None:
            value = optimizer.defaults.get(self._name, value)
        return cast(T, ops.forced(value) if self._name == "backend" else value)

    def __set__(self, optimizer: Any, value: T) -> None:
        kept = dict(optimizer.defaults)
        Options(**{**{name: other for name, other in kept.items() if name in NAMES}, self._name: value})
        optimizer.defaults[self._name] = value
        try:
            if self._name == "state_dtype":
                optimizer._check_forms()  # of the new value: it asks the groups, which ask the optimizer
        except Exception:  # of whatever kind, a warning that is one, too: it goes on, and nothing has changed
            optimizer.defaults.clear()
            optimizer.defaults.update(kept)
            raise
        if value == getattr(Options, self._name):
            del optimizer.defaults[self._name]
