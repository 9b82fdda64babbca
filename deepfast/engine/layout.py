"""Where gradients lie in a bucket, and which rank owns which of its elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

# Elements of a block of the statistics (csrc/math/squares.h). Norms are added up block by block, and a rank owns whole
# blocks: so they do not depend on the number of ranks.
BLOCK = 4096
_ALIGN = 16  # elements: the widest vector of halves


@dataclasses.dataclass(frozen=True)
class Layout:
    """One bucket.

    Attributes:
        offsets: where each parameter begins. One of more than a block begins with a block, a smaller one lies in one
            block: where a parameter is cut, it is cut into whole blocks of its own.
        numel: elements up to the last parameter's end.
        chunk: elements that each rank owns, one after the other; the last ranks may own fewer, or none.
    """

    offsets: tuple[int, ...]
    numel: int
    chunk: int

    @classmethod
    def of(cls, params: Sequence[Tensor], ranks: int, block: int = BLOCK) -> Layout:
        offsets, end = [], 0
        for p in params:
            numel = p.numel()
            start = -(-end // _ALIGN) * _ALIGN
            if numel > block - start % block and start % block:
                start = -(-start // block) * block
            offsets.append(start)
            end = start + numel
        blocks = -(-end // block)
        return cls(tuple(offsets), end, -(-blocks // ranks) * block)

    def gaps(self, params: Sequence[Tensor], end: int) -> list[tuple[int, int]]:
        """The elements [begin, end) in between, and behind, that belong to no parameter; up to ``end``."""
        ends = [at + p.numel() for at, p in zip(self.offsets, params, strict=True)]
        pairs = zip([0, *ends], [*self.offsets, end], strict=True)
        return [(begin, until) for begin, until in pairs if begin < until]

    def owned(self, rank: int) -> tuple[int, int]:
        """The elements [begin, end) of the bucket that ``rank`` owns."""
        return min(rank * self.chunk, self.numel), min((rank + 1) * self.chunk, self.numel)

    def part(self, nth: int, p: Tensor, rank: int) -> tuple[int, int]:
        """Which elements [begin, end) of the nth parameter, ``p``, are ``rank``'s; begin == end where none is."""
        begin, end = (min(max(at - self.offsets[nth], 0), p.numel()) for at in self.owned(rank))
        return begin, end
