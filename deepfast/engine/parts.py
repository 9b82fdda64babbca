"""What of a parameter this rank keeps the state of: all of it, or the elements that a sharded engine has given it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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

    def of(self, t: Any) -> Any:
        """This part of a tensor that has the parameter's shape, in memory of its own; anything else as it is."""
        if not isinstance(t, Tensor) or t.shape != self.whole.shape or not self.sharded:
            return t
        flat = torch.empty_like(self.whole, dtype=t.dtype).copy_(t)
        return flat.as_strided((flat.numel(),), (1,))[self.begin : self.end].clone()

    @classmethod
    def all_of(cls, p: Tensor) -> Part:
        return cls(p, p, 0, p.numel())
