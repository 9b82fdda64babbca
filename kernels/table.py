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
SEED = tl.constexpr(13)  # of the random bits that it is rounded with,
PLACE = tl.constexpr(14)  # and where in the whole parameter it begins
COLUMNS = tl.constexpr(15)


class Kind(NamedTuple):
    """What a launch is compiled for."""

    param: torch.dtype
    master: torch.dtype | None  # fp32, or (int16) what the parameter lacks of that
    grad: torch.dtype
    moments: tuple[torch.dtype, ...]  # int8, uint8: in groups (int8.py)
    chance: bool  # how the weight is rounded
    pack: int  # elements that lie aligned together in every stream
    read: int  # likewise in the gradient alone

    def streams(self) -> tuple[Any, ...]:
        """The types of parameter, master, gradient and moments, in Triton's words, and ``pack``."""
        moments = tuple(TYPES[moment] for moment in self.moments)
        return TYPES[self.param], TYPES[self.master], TYPES[self.grad], moments, self.pack


class Span(NamedTuple):
    """A run of elements of one parameter with everything that a step touches for them; addresses, 0 for none."""

    kind: Kind
    param: int
    grad: int
    master: int
    moments: tuple[int, int, int]
    step: int  # fp32 [1]
    numel: int
    group: int  # row of the hyperparameter table
    seed: int
    place: int


Stream = tuple[int, torch.dtype]
"""Where one lies, and its type."""


def span_of(
    param: Stream,
    grad: Stream,
    numel: int,
    master: Stream | None = None,
    moments: Sequence[Stream] = (),
    step: int = 0,
    group: int = 0,
    chance: tuple[int, int] = (0, 0),
    stochastic: bool = False,
) -> Span:
    """A span whose kind follows from its streams' addresses and dtypes.

    Args:
        chance: seed and place of the random bits: what is rounded by chance has those of the elements from there on.
        stochastic: whether a 16-bit weight without a master is.
    """
    streams = [param, grad, *moments] if master is None else [param, grad, master, *moments]
    pack = 16 // max(dtype.itemsize for _, dtype in streams)
    aligned = all(address % (pack * dtype.itemsize) == 0 for address, dtype in streams)
    read = 16 // grad[1].itemsize if grad[0] % 16 == 0 else 1
    by_chance = stochastic and master is None and param[1] != torch.float32
    held = None if master is None else master[1]
    types = tuple(dtype for _, dtype in moments)
    kind = Kind(param[1], held, grad[1], types, by_chance, pack if aligned else 1, read)
    first, second, third = (*(address for address, _ in moments), 0, 0, 0)[:3]
    at_master = 0 if master is None else master[0]
    return Span(kind, param[0], grad[0], at_master, (first, second, third), step, numel, group, *chance)


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
            kind, param, grad, master, moments, step, numel, group, seed, place = spans[i]
            rows += (param, grad, master, *moments, step, numel, group)
            rows += (i, self.blocks, read, read_index[i], seed, place)
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

TYPES: dict[Any, Any] = {**DTYPES, torch.int16: tl.int16, None: None, torch.int8: tl.int8, torch.uint8: tl.uint8}
"""Likewise a master's, or that there is none, and those of moments in groups."""


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
