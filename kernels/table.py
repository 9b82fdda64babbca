"""The spans of a launch, on the device: one row each, and which span every block of elements belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfast import graphs

STEP_BLOCK, READ_BLOCK = 1024, 4096  # elements, as in csrc/math/squares.h

# Columns of a row.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
MASTER = tl.constexpr(2)
MOMENT = tl.constexpr(3)
STEP = tl.constexpr(6)
NUMEL = tl.constexpr(7)
GROUP = tl.constexpr(8)
INDEX = tl.constexpr(9)  # the span's place among the gradients
FIRST = tl.constexpr(10)  # its first STEP_BLOCK,
READ_FIRST = tl.constexpr(11)  # its first READ_BLOCK,
READ_INDEX = tl.constexpr(12)  # and where that one's sum belongs: sums are added in the gradients' order
COLUMNS = tl.constexpr(13)


class Kind(NamedTuple):
    """What a launch is compiled for."""

    param: torch.dtype
    master: bool
    grad: torch.dtype
    pack: int  # elements that lie aligned together in every stream
    read: int  # likewise in the gradient alone


class Span(NamedTuple):
    """A run of elements of one parameter with everything that a step touches for them; addresses, 0 for none."""

    kind: Kind
    param: int
    grad: int
    master: int
    moments: tuple[int, int, int]  # fp32
    step: int  # fp32 [1]
    numel: int
    group: int  # row of the hyperparameter table


def span_of(
    param: tuple[int, torch.dtype],
    grad: tuple[int, torch.dtype],
    numel: int,
    master: int = 0,
    moments: Sequence[int] = (),
    step: int = 0,
    group: int = 0,
) -> Span:
    """A span whose kind follows from its streams' addresses and dtypes."""
    wide = any((master, *moments, param[1].itemsize == 4, grad[1].itemsize == 4))
    pack = 4 if wide else 8  # 16 bytes of the widest stream
    streams = [(*param,), (*grad,), (master, torch.float32), *((m, torch.float32) for m in moments)]
    aligned = all(address % (pack * dtype.itemsize) == 0 for address, dtype in streams)
    read = 16 // grad[1].itemsize if grad[0] % 16 == 0 else 1
    kind = Kind(param[1], bool(master), grad[1], pack if aligned else 1, read)
    first, second, third = (*moments, 0, 0, 0)[:3]
    return Span(kind, param[0], grad[0], master, (first, second, third), step, numel, group)


class Launch(NamedTuple):
    """The blocks that one kind of span has in the table."""

    kind: Kind
    first: int  # STEP_BLOCKs
    blocks: int
    read_first: int  # READ_BLOCKs
    read_blocks: int


class Table:
    """Spans on ``device``, kind after kind, in as many launches as there are kinds.

    Args:
        spans: in the gradients' order.
        previous: a table whose map of blocks is taken over if it is the same.

    Attributes:
        rows: int64 [spans, COLUMNS].
        owners, read_owners: int32 [blocks], the row that each block belongs to.
    """

    owners: Tensor
    read_owners: Tensor

    def __init__(self, spans: Sequence[Span], device: torch.device, previous: Table | None = None) -> None:
        self.spans, self.device = spans, device
        kinds: dict[Kind, int] = {}
        for span in spans:
            kinds.setdefault(span.kind, len(kinds))
        order = sorted(range(len(spans)), key=lambda i: kinds[spans[i].kind])
        read_index, self.read_blocks = [], 0
        for span in spans:
            read_index.append(self.read_blocks)
            self.read_blocks += -(-span.numel // READ_BLOCK)
        rows: list[int] = []
        self.launches: list[Launch] = []
        self.blocks = read = 0
        for i in order:
            kind, param, grad, master, moments, step, numel, group = spans[i]
            rows += (param, grad, master, *moments, step, numel, group, i, self.blocks, read, read_index[i])
            if not self.launches or self.launches[-1].kind != kind:
                self.launches.append(Launch(kind, self.blocks, 0, read, 0))
            blocks, read_blocks = -(-numel // STEP_BLOCK), -(-numel // READ_BLOCK)
            last = self.launches[-1]
            self.launches[-1] = last._replace(blocks=last.blocks + blocks, read_blocks=last.read_blocks + read_blocks)
            self.blocks += blocks
            read += read_blocks
        self.rows = upload(rows, device).view(-1, COLUMNS.value)
        self._numels = [spans[i].numel for i in order]
        if previous is not None and previous._numels == self._numels:
            self.owners, self.read_owners = previous.owners, previous.read_owners
        else:
            self.owners = self._owners(STEP_BLOCK, self.blocks)
            self.read_owners = self._owners(READ_BLOCK, read)

    def __len__(self) -> int:
        return len(self.spans)

    def _owners(self, block: int, blocks: int) -> Tensor:
        """Found on the device: nothing of this size has to be sent."""
        counts = (self.rows[:, NUMEL.value] + (block - 1)) // block
        rows = torch.arange(len(self), dtype=torch.int32, device=self.device)
        return torch.repeat_interleave(rows, counts, output_size=blocks)


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``values`` on ``device``, without waiting for it.

    Into a CUDA graph they go as parameters of kernels: what a replay would copy from host memory could be gone by
    then, and a device tensor filled outside the graph is somebody else's once it is freed.
    """
    if graphs.capturing(device):
        return _written(values, device)
    if device.type == "cuda" and device not in _READY:
        _written([0], device)  # a module cannot be loaded while a graph is captured
        _READY.add(device)
    host = torch.tensor(values, dtype=torch.int64, device="cpu")
    # torch keeps pinned memory until the copy is over.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


_READY: set[torch.device] = set()  # where _write is loaded
_AT_ONCE = 256  # 32-bit words, 2 KiB of a kernel's 4 KiB of parameters


@triton.jit(do_not_specialize=["words"])
def _write(out, words):
    for i in tl.static_range(len(words)):
        tl.store(out + i, ((words[i] >> 1) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True))


def _disguised(word: int) -> int:
    """A 32-bit word as an odd number of 64 bits.

    Triton compiles anew for arguments of 32 bits, for 1 and for multiples of 16, and does so for what is in a tuple
    even where it is told not to.
    """
    return (1 << 33) + ((word & 0xFFFFFFFF) << 1) + 1


def _written(values: Sequence[int], device: torch.device) -> Tensor:
    words = torch.tensor(values, dtype=torch.int64, device="cpu").view(torch.int32).tolist()
    words += [0] * (-len(words) % _AT_ONCE)
    out = torch.empty(len(words), dtype=torch.int32, device=device)
    for first in range(0, len(words), _AT_ONCE):
        some = tuple(map(_disguised, words[first : first + _AT_ONCE]))
        launch(_write, 1, device, out[first:], some, num_warps=1)
    return out[: 2 * len(values)].view(torch.int64)


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What the kernels take, and what it is called in them."""


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any) -> None:
    """The one way a kernel is launched. Contraction is off: a multiply-add is fused where the source says fma."""
    if programs == 0:
        return
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)


@triton.jit
def values(at, COUNT: tl.constexpr):
    """COUNT values from ``at`` on, as a tuple."""
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (tl.load(at + k),)
    return out
