"""What of a parameter this rank keeps the state of: all of it, or the elements that a sharded engine has given it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Elements [begin, end) of a parameter, counted as they lie in its memory.

    Attributes:
        whole: the module's parameter.
        mine: what the optimizer's groups hold: a 1-D view of those elements; ``whole`` itself where nothing is sharded.
            The optimizer's state of it has its shape.
    """

    whole: Tensor
    mine: Tensor
    begin: int
    end: int

    @property
    def sharded(self) -> bool:
        return self.mine is not self.whole

    @classmethod
    def all_of(cls, p: Tensor) -> Part:
        return cls(p, p, 0, p.numel())
