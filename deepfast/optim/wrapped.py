"""What an optimizer has in common with the wrappers that frameworks put around it.

A scaler hands over the scale by setting attributes around ``step``. Lightning and Fabric give it a wrapper whose class
is made of the optimizer's: what is set there would stay there, while the step is the optimizer's. Whatever a wrapper
does not find it reads from the optimizer, though, and ``_shared`` only that one has. So both see the same.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

_NONE = object()


T = TypeVar("T")
Self = TypeVar("Self", bound="Shared[Any]")


class Shared(Generic[T]):
    """An attribute that lies in ``_shared``; without a default it is there only while somebody has set it."""

    def __init__(self, default: T | object = _NONE) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self: Self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> T: ...
    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        value = optimizer._shared.get(self._name, self._default)
        if value is _NONE:
            raise AttributeError(f"{type(optimizer).__name__} has no {self._name} now: no scaler has set it")
        return value

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._shared[self._name] = value

    def __delete__(self, optimizer: Any) -> None:
        if optimizer._shared.pop(self._name, _NONE) is _NONE:
            raise AttributeError(self._name)


class Verdict(Shared[T]):
    """``found_inf``: who sets it and takes it back has called a step in between, which must have seen it."""

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._has_stepped = False
        super().__set__(optimizer, value)

    def __delete__(self, optimizer: Any) -> None:
        super().__delete__(optimizer)
        check_seen(optimizer)


def check_seen(optimizer: Any) -> None:
    if not optimizer._has_stepped:
        raise RuntimeError(
            f"deepfast: {type(optimizer).__name__}.step() has not called the deepfast optimizer's, so nothing has "
            "unscaled the gradients or skipped an overflow: give the scaler the optimizer that steps"
        )
