"""State dictionaries that say when somebody has put something else into them.

A step goes through what it has planned before. Looking each time whether every entry of every parameter's state is
still the same tensor would take longer than all the rest, and would keep alive what somebody has moved away.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

_WRITES = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")


class _Changes:
    """How often the dictionaries of one optimizer have been written to."""

    count = 0


def _noticed(method: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.changes.count += 1
        return method(self, *args, **kwargs)

    return write


class ParameterState(dict[str, Any]):
    """One parameter's state."""

    changes = _Changes()  # of those that belong to no optimizer

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _entry(changes: _Changes, values: Any = ()) -> ParameterState:
    entry = ParameterState(values)
    entry.changes = changes
    return entry


class States(defaultdict[Any, Any]):
    """An optimizer's state: parameter -> ParameterState. Entries of other kinds are kept, and looked at each time."""

    def __init__(self, entries: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        self.changes = _Changes()
        super().__init__(functools.partial(_entry, self.changes))
        for key, value in dict(entries).items():
            self[key] = _entry(self.changes, value) if isinstance(value, dict) else value

    def __reduce__(self) -> Any:
        return defaultdict, (dict, self.plain())

    def copy(self) -> Any:
        return defaultdict(dict, self)

    __copy__ = copy

    def plain(self) -> dict[Any, Any]:
        """The same with ordinary dictionaries, as they go into a state_dict."""
        return {key: dict(value) if isinstance(value, ParameterState) else value for key, value in self.items()}


def unwatched(state: Mapping[Any, Any], params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters whose entries do not say when they are written to: dictionaries that somebody has put there.

    (One of another optimizer's says so to that one.)
    """
    if not isinstance(state, States):
        return list(params)
    entries = ((p, state.get(p)) for p in params)
    return [p for p, entry in entries if entry is not None and getattr(entry, "changes", None) is not state.changes]


def look(state: Mapping[Any, Any], unwatched: Iterable[Tensor]) -> Any:
    """Equal to what it was before where nothing has been put into ``state`` since. Keeps no tensor alive.

    To be compared where tensors are compared by identity.
    """
    changes = state.changes.count if isinstance(state, States) else None
    entries = [list(state.get(p, {}).items()) for p in unwatched]
    return changes, [[(k, weakref.ref(v) if isinstance(v, Tensor) else id(v)) for k, v in e] for e in entries]


for _class in (ParameterState, States):
    for _name in _WRITES:
        setattr(_class, _name, _noticed(getattr(_class, _name)))
