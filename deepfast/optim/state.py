"""State dictionaries that say when somebody has put something else into them.

A step goes through what it has planned before. Looking each time whether every entry of every parameter's state is
still the same tensor would take longer than all the rest, and would keep alive what somebody has moved away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_WRITES = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
_changes = 0


def changes() -> int:
    """How often any of these dictionaries has been written to."""
    return _changes


def _noticed(method: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _changes  # noqa: PLW0603
        _changes += 1
        return method(self, *args, **kwargs)

    return write


class ParameterState(dict[str, Any]):
    """One parameter's state."""


class States(defaultdict[Any, Any]):
    """An optimizer's state: parameter -> ParameterState. Entries of other kinds are kept, and looked at each time."""

    def __init__(self, entries: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        super().__init__(ParameterState)
        for key, value in dict(entries).items():
            self[key] = ParameterState(value) if isinstance(value, dict) else value

    def __reduce__(self) -> Any:
        return defaultdict, (dict, self.plain())

    def plain(self) -> dict[Any, Any]:
        """The same with ordinary dictionaries, as they go into a state_dict."""
        return {key: dict(value) if isinstance(value, ParameterState) else value for key, value in self.items()}

    def watched(self) -> bool:
        """Whether every entry is one that says when it is written to."""
        return all(type(value) is ParameterState for value in self.values())


for _class in (ParameterState, States):
    for _name in _WRITES:
        setattr(_class, _name, _noticed(getattr(_class, _name)))
