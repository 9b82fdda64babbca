"""Data without an end."""

from __future__ import annotations

from typing import Any


class RepeatingLoader:
    """An iterator that begins anew where ``loader`` ends.

    Raises:
        StopIteration: only where ``loader`` is empty.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)
