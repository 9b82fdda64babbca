"""Parameters of which each rank steps a part: what the optimizer asks of the engine that has cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024  # elements that a rule's norms are measured in, and rows of blocks that are added at a time:
ROW = 256  # csrc/math/squares.h


class Parts:
    """Each rank has one part of every parameter, perhaps an empty one, and all have them in the same order."""

    def sinks(self, part: Tensor) -> tuple[int, ...]:
        """How many bytes after this rank's weights the other ranks have theirs; none where a step cannot reach them."""
        raise NotImplementedError

    def extent(self, part: Tensor) -> tuple[int, int]:
        """Where in the whole parameter ``part`` begins, and how many elements that has."""
        raise NotImplementedError

    def sum_(self, t: Tensor) -> Tensor:
        """Adds ``t`` up over the ranks, in place."""
        raise NotImplementedError

    def norms(self, plan: Any, parts: Sequence[Tensor], *how: Any) -> Tensor:
        """fp64 [parts, 2]: what ``plan.norms`` would say of the whole parameters, if it had them.

        Where a plan tells its blocks apart, to the last bit: blocks are added in the order that they have in the whole.
        """
        if not hasattr(plan, "norms_of_blocks"):
            return self.sum_(plan.norms(*how))
        found = plan.norms_of_blocks(*how)
        extents = [self.extent(part) for part in parts]
        counts = [-(-numel // BLOCK) for _, numel in extents]
        blocks = found.new_zeros(sum(counts), 2)
        taken = first = 0
        for part, (begin, _), count in zip(parts, extents, counts, strict=True):
            own, at = -(-part.numel() // BLOCK), first + begin // BLOCK
            blocks[at : at + own] = found[taken : taken + own]
            taken, first = taken + own, first + count
        return torch.stack([_folded(whole) for whole in self.sum_(blocks).split(counts)])


def _folded(blocks: Tensor) -> Tensor:
    """The sum over fp64 [blocks, 2], pairwise in rows, and over the rows' sums likewise."""
    while True:
        missing = -len(blocks) % ROW if len(blocks) else ROW
        lanes = torch.cat([blocks, blocks.new_zeros(missing, 2)]).view(-1, ROW, 2)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        blocks = lanes[:, 0]
        if len(blocks) == 1:
            return blocks[0]
