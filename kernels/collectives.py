"""All-reduce, reduce-scatter and all-gather over peer memory. The twin of ``csrc/cuda/collectives``.

One launch an operation and a rank. Its programs meet their namesakes of the other ranks by flags in the memory of the
one who waits: when one has arrived, its rank's kernel has begun, so that rank's data is there. Little data is copied to
where all can read it, and summed by every rank (one-shot). Much data must lie in peer memory: each rank sums its
portion for all, and writes the result to all (two-shot). Nothing waits on the host.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import squares
from .checks import check_device, check_values, require, written
from .codec import decode, encode, load, pointer
from .table import DTYPES, READ_BLOCK, launch

ELEMENTS = {**DTYPES, torch.float64: tl.float64, torch.int32: tl.int32, torch.int64: tl.int64}
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
ONE_SHOT_BYTES = 256 * 1024
SUMS = 1 << 19  # blocks of statistics, of one operation
PROGRAMS = 64  # at most: a GPU must hold them all at once
WARPS = 4  # of a program: a multiprocessor has registers for two programs, however many a thread takes
MOST_RANKS = 8  # GPUs of one host

BLOCK = tl.constexpr(READ_BLOCK)
PEERS = tl.constexpr(MOST_RANKS)
LOOK = tl.constexpr(64)  # spins between two looks at what the host says: its memory is far away

# The beginning of a rank's peer memory, in words of 4 bytes; zero at first.
OPERATIONS = tl.constexpr(0)  # that have ended
ENDED = tl.constexpr(1)  # programs of this one
BROKEN = tl.constexpr(2)  # one has failed: those that were launched after it must not go on
MEETING = tl.constexpr(32)  # words that a program and its namesakes have, [1 + PROGRAMS] of them:
ARRIVED = tl.constexpr(0)  # [PEERS]: how often rank r's has come to a meeting here
COUNT = tl.constexpr(8)  # how often this one has: its own affair
SAID = tl.constexpr(10)  # int64 [2][4]: what is to be done, in even and odd operations
# What follows, in bytes.
STAGE_AT = tl.constexpr(-(-(1 + PROGRAMS) * 32 * 4 // 4096) * 4096)  # [2][ONE_SHOT], by even and odd operations
ONE_SHOT = tl.constexpr(ONE_SHOT_BYTES)
SUMS_AT = tl.constexpr(STAGE_AT.value + 2 * ONE_SHOT_BYTES)  # fp64 [SUMS]: of the blocks of the result

# Words of `status`, in pinned host memory: what host and device tell each other. See csrc/cuda/collectives.h.
GIVE_UP, BEGUN, STATUS_ENDED, DISAGREE, BEGUN_KIND, MISSING = (tl.constexpr(i) for i in range(6))


@triton.jit
def words(address):
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def meeting(address):
    """This program's."""
    return words(address) + (1 + tl.program_id(0)) * MEETING


@triton.jit
def told(at):
    """A word that somebody else may be setting: each thread looks, and all are told the same."""
    return tl.max(tl.load(at + tl.zeros([128], tl.int32), volatile=True), 0)


@triton.jit
def of_all(addresses, RANKS: tl.constexpr):
    """[PEERS]: the addresses, as many as there are."""
    rank = tl.arange(0, PEERS)
    at = tl.zeros([PEERS], tl.int64)
    for r in tl.static_range(RANKS):
        at = tl.where(rank == r, addresses[r], at)
    return at


@triton.jit
def meet(shared, status, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Until all namesakes of this program are here; the one place where a kernel waits. False: the host gave up."""
    tl.debug_barrier()  # what the other threads have written is told with the flag
    rank = tl.arange(0, PEERS)
    everyone = rank < RANKS
    mine = meeting(shared[RANK])
    nth = tl.load(mine + COUNT) + 1
    tl.atomic_xchg(meeting(of_all(shared, RANKS)) + ARRIVED + RANK, tl.zeros([PEERS], tl.int32) + nth, mask=everyone,
                   sem="release", scope="sys")  # fmt: skip
    late = everyone
    waits = True
    spin = 1
    while waits:
        arrived = tl.atomic_add(mine + ARRIVED + rank, tl.zeros([PEERS], tl.int32), mask=everyone, sem="acquire",
                                scope="sys")  # fmt: skip
        late = everyone & (arrived - nth < 0)
        waits = tl.max(late.to(tl.int32), 0) > 0
        if spin % LOOK == 0:
            waits = waits & (told(status + GIVE_UP) == 0)
        spin += 1
    tl.store(status + MISSING + rank, tl.full([PEERS], 1, tl.int32), mask=late)
    tl.store(mine + COUNT, nth)
    tl.debug_barrier()
    return tl.max(late.to(tl.int32), 0) == 0


@triton.jit
def begin(shared, status, operation, what, numel, place, factor, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The first meeting, where all say what they are about to do. False: the ranks did not come, or differ.

    Whoever still read what was said in the operation before the last has not come to the last one, where this rank
    has been.
    """
    offset = SAID + (operation & 1) * 8
    mine = (meeting(shared[RANK]) + offset).to(tl.pointer_type(tl.int64))
    tl.store(mine, what)
    tl.store(mine + 1, numel)
    tl.store(mine + 2, place)
    tl.store(mine + 3, factor)
    tl.store(status + BEGUN_KIND, what & 0xFF)
    tl.store(status + BEGUN, operation + 1)
    same = meet(shared, status, RANK, RANKS)
    if same:
        everyone = tl.arange(0, PEERS) < RANKS
        said = (meeting(of_all(shared, RANKS)) + offset).to(tl.pointer_type(tl.int64))
        differs = tl.load(said, mask=everyone, other=0) != what
        differs = differs | (tl.load(said + 1, mask=everyone, other=0) != numel)
        differs = differs | (tl.load(said + 2, mask=everyone, other=0) != place)
        differs = differs | (tl.load(said + 3, mask=everyone, other=0) != factor)
        same = tl.max((everyone & differs).to(tl.int32), 0) == 0
        if not same:
            tl.store(status + DISAGREE, 1)
    return same


@triton.jit
def portion(blocks, index, count):
    """The first block of the share number ``index`` of ``count``, and the one after its last."""
    return blocks * index // count, blocks * (index + 1) // count


@triton.jit
def total(x, factor, DTYPE: tl.constexpr):
    """What each rank has, summed in rank order, times the fp64 ``factor``: see csrc/math/collective.h.

    A sum that leaves fp32's range is taken from fp64, before it is divided: a finite mean never becomes infinite.
    (Both are summed always: a question would stop all loads until it was answered.)
    """
    out = x[0]
    wide = x[0].to(tl.float64)
    for r in tl.static_range(1, len(x)):
        out += x[r]
        wide += x[r].to(tl.float64)
    if DTYPE == tl.float64:
        out *= factor
    elif DTYPE.is_floating():
        rounded = factor.to(tl.float32)
        out *= rounded
        out = tl.where(out - out == 0, out, (wide * rounded.to(tl.float64)).to(tl.float32))
    return out


@triton.jit
def reduce(
    sources,  # addresses, [RANKS]
    targets,  # addresses: where the result goes, the same to all
    block,  # [TILE]
    end,  # elements
    factor,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PACK: tl.constexpr,
    RANKS: tl.constexpr,
    OWN: tl.constexpr,  # which target is this rank's
    MEASURE: tl.constexpr,
    MASKED: tl.constexpr,  # whether some of the blocks are not whole
):
    """TILE blocks; [TILE]: the sums of squares of what was stored, where MEASURE says that they are wanted."""
    TILE: tl.constexpr = block.shape[0]
    ROW: tl.constexpr = squares.LANES if MEASURE else 1024
    # Rows under way at once: 8 or 16 accesses of a thread, whatever the number of ranks.
    UNROLL: tl.constexpr = (2 if MEASURE else 1) * (4 if RANKS <= 2 else 2 if RANKS <= 4 else 1)
    at = (block * BLOCK)[:, None] + tl.arange(0, ROW)[None, :]
    sums = tl.zeros([TILE, ROW], tl.float32)
    largest = tl.zeros([TILE, ROW], tl.int32)
    for first in range(0, BLOCK, UNROLL * ROW):
        rows = ()
        for row in tl.static_range(UNROLL):
            i = at + (first + row * ROW)
            mask = i < end if MASKED else None
            everybodys = ()
            for r in tl.static_range(RANKS):
                everybodys = everybodys + (load(pointer(sources[r], IN, PACK) + i, mask, IN),)
            rows = rows + (everybodys,)
        for row in tl.static_range(UNROLL):
            i = at + (first + row * ROW)
            mask = i < end if MASKED else None
            out = encode(total(rows[row], factor, IN), OUT, False)
            for t in tl.static_range(len(targets)):
                tl.store(pointer(targets[t], OUT, PACK) + i, out, mask)
            if MEASURE:
                sums, largest = squares.add(sums, largest, decode(out, OUT))
    totals = tl.zeros([TILE], tl.float64)
    if MEASURE:
        lanes = sums.to(tl.float64)
        wide = squares.needs_fp64(largest)
        if tl.max(wide.to(tl.int32), 0) > 0:
            tl.debug_barrier()  # what is read again may have been stored by another thread
            again = tl.zeros([TILE, ROW], tl.float64)
            for first in range(0, BLOCK, ROW):
                x = load(pointer(targets[OWN], OUT, PACK) + at + first, at + first < end, OUT).to(tl.float64)
                again += x * x
            lanes = tl.where(wide[:, None], again, lanes)
        totals = squares.pairwise(lanes, TILE, 6)
    return totals


@triton.jit
def copy(source, target, begin, end, IN: tl.constexpr, OUT: tl.constexpr, PACK: tl.constexpr):
    """Elements [begin, end), bit by bit where the type stays; begin is a multiple of BLOCK."""
    source, target = pointer(source, IN, PACK), pointer(target, OUT, PACK)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        if first + BLOCK <= end:
            x = tl.load(source + i)
            tl.store(target + i, x if IN == OUT else encode(decode(x, IN), OUT, False))
        else:
            x = tl.load(source + i, mask=i < end, other=0)
            tl.store(target + i, x if IN == OUT else encode(decode(x, IN), OUT, False), i < end)


@triton.jit(do_not_specialize=["numel", "place", "factor"])
def collective_kernel(
    shared,  # addresses [RANKS]: where each rank's peer memory begins, as this one sees it
    sources,  # addresses [RANKS]: what is summed or gathered; of a one-shot sum [1], this rank's input
    targets,  # addresses: where this rank's result goes; of a two-shot sum [RANKS], everybody's
    numel,
    place,  # of the input in peer memory, the same number on all ranks; < 0: it lies elsewhere
    factor,  # bits of the fp64: an argument would be rounded to fp32
    statistics,  # fp64 [2] of the output, or None
    found_inf,  # fp32 [1], set to 1 where the output is not finite; or None
    status,  # address
    KIND: tl.constexpr,  # of KINDS
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PACK: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ONE_SHOT_SUM: tl.constexpr,
    WHAT: tl.constexpr,  # kind, types and whether it is measured, as the ranks tell each other
):
    MEASURE: tl.constexpr = statistics is not None or found_inf is not None
    TWO_SHOT: tl.constexpr = KIND == 0 and not ONE_SHOT_SUM
    OWN: tl.constexpr = RANK if TWO_SHOT else 0
    TILE: tl.constexpr = squares.TILE if MEASURE else 1
    own = words(shared[RANK])
    status = words(status)
    numel, place, factor = numel.to(tl.int64), place.to(tl.int64), factor.to(tl.int64)
    times = factor.to(tl.float64, bitcast=True)
    operation = tl.load(own + OPERATIONS)
    first, end = tl.zeros([], tl.int64), (numel + BLOCK - 1) // BLOCK
    if TWO_SHOT:
        first, end = portion(end, RANK, RANKS)
    share, share_end = portion(end - first, tl.program_id(0), tl.num_programs(0))
    first, end = first + share, first + share_end
    until = tl.minimum(end * BLOCK, numel)

    if ONE_SHOT_SUM:
        stage = STAGE_AT + (operation & 1).to(tl.int64) * ONE_SHOT
    good = told(own + BROKEN) == 0
    if good:
        if ONE_SHOT_SUM:
            copy(sources[0], shared[RANK] + stage, first * BLOCK, until, IN, IN, PACK)
        good = begin(shared, status, operation, WHAT, numel, place, factor, RANK, RANKS)
    if good:
        if KIND == 2:
            for r in tl.static_range(RANKS):
                copy(sources[r], targets[r], first * BLOCK, until, IN, OUT, PACK)
        else:
            parts = ()
            for r in tl.static_range(RANKS):
                parts = parts + ((shared[r] + stage) if ONE_SHOT_SUM else sources[r],)
            for tile in range(first, end, TILE):
                block = tile + tl.arange(0, TILE)
                if (tile + TILE) * BLOCK <= until:
                    sums = reduce(parts, targets, block, until, times, IN, OUT, PACK, RANKS, OWN, MEASURE, False)
                else:
                    sums = reduce(parts, targets, block, until, times, IN, OUT, PACK, RANKS, OWN, MEASURE, True)
                for r in tl.static_range(RANKS):
                    if MEASURE and (TWO_SHOT or r == RANK):
                        tl.store((shared[r] + SUMS_AT).to(tl.pointer_type(tl.float64)) + block, sums, block < end)
        if not ONE_SHOT_SUM:  # until then nobody may touch what another reads or writes
            good = meet(shared, status, RANK, RANKS)
    if good:
        tl.debug_barrier()
        if tl.atomic_add(own + ENDED, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            tl.store(own + ENDED, 0)
            tl.store(own + OPERATIONS, operation + 1)
            tl.store(status + STATUS_ENDED, operation + 1)
            if MEASURE:
                partial = (shared[RANK] + SUMS_AT).to(tl.pointer_type(tl.float64))
                sum_of_squares, non_finite = squares.fold(partial, (numel + BLOCK - 1) // BLOCK)
                answer(statistics, found_inf, sum_of_squares, non_finite)
    else:  # nothing was done: a step that asks the statistics must be skipped
        tl.store(own + BROKEN, 1)
        if MEASURE:
            answer(statistics, found_inf, tl.full([1], float("inf"), tl.float64), tl.full([1], 1.0, tl.float64))


@triton.jit
def answer(statistics, found_inf, sum_of_squares, non_finite):
    """[1] each."""
    at = tl.arange(0, 1)
    if statistics is not None:
        tl.store(statistics + at, sum_of_squares)
        tl.store(statistics + 1 + at, non_finite)
    if found_inf is not None:
        tl.store(found_inf + at, tl.full([1], 1.0, tl.float32), non_finite > 0)


def peer_layout() -> list[int]:
    """The most ranks; bytes of peer memory that each needs; bytes that an all-reduce takes from anywhere;
    multiprocessors that one operation's programs fill."""
    return [MOST_RANKS, SUMS_AT.value + SUMS * 8, ONE_SHOT_BYTES, PROGRAMS // 2]


def collective_(
    kind: str,
    source: Tensor,
    output: Tensor,
    shared: Sequence[int],
    data: Sequence[int],
    place: int,
    rank: int,
    factor: float,
    statistics: Tensor | None,
    found_inf: Tensor | None,
    status: Tensor,
) -> None:
    """One launch of ``kind`` on the current stream. What lies where is :mod:`deepfast.comm.device`'s affair.

    kind: ``"all_reduce"`` (in place), ``"reduce_scatter"`` (source [ranks][numel]) or ``"all_gather"`` (output
    likewise). shared: each rank's peer memory, as this one sees it. data: each rank's source, or nothing where it does
    not lie there. place: of the source, the same number on all ranks. statistics: fp64 [2], of the output; found_inf:
    fp32 [1], set to 1 where it is not finite. status: int32, in pinned memory.
    """
    require(kind in KINDS, f"no such collective: {kind}")
    require(
        source.dtype in ELEMENTS and output.dtype in ELEMENTS and source.is_contiguous() and output.is_contiguous(),
        f"{kind} takes contiguous float32, float16, bfloat16, float64, int32 and int64",
    )
    check_device(output, source.device, "the output")
    ranks = len(shared)
    require(0 <= rank < ranks <= MOST_RANKS, f"rank {rank} of {ranks}")
    require(status.dtype == torch.int32 and status.numel() >= MISSING.value + MOST_RANKS, "a short status")
    numel, in_place = min(source.numel(), output.numel()), kind == "all_reduce"
    require(
        source.numel() == numel * (ranks if kind == "reduce_scatter" else 1)
        and output.numel() == numel * (ranks if kind == "all_gather" else 1)
        and (not in_place or source.data_ptr() == output.data_ptr()),
        f"{kind} of {source.numel()} elements into {output.numel()}",
    )
    one_shot = in_place and not data
    require(
        bool(data) or (one_shot and source.nbytes <= ONE_SHOT_BYTES),
        f"{kind} of so much needs its input in peer memory",
    )
    if statistics is not None:
        check_values(statistics, 2, "statistics", source.device, torch.float64)
    if found_inf is not None:
        check_values(found_inf, 1, "found_inf", source.device)
    measure = statistics is not None or found_inf is not None
    blocks = -(-numel // READ_BLOCK)
    require(
        not measure or (output.dtype in DTYPES and blocks <= SUMS),
        "statistics are of fp32, fp16 and bf16, and of at most 2^31 elements",
    )
    sources, targets = list(data), [output.data_ptr()]
    if one_shot:
        sources = [source.data_ptr()]
    elif in_place:
        targets = list(data)
    elif kind == "reduce_scatter":
        sources = [at + rank * numel * source.itemsize for at in data]
    else:
        targets = [output.data_ptr() + r * numel * output.itemsize for r in range(ranks)]
    aligned = all(at % 16 == 0 for at in (*sources, *targets))
    share = blocks if one_shot or not in_place else -(-blocks // ranks)
    types = list(ELEMENTS)
    what = KINDS.index(kind) | types.index(source.dtype) << 8 | types.index(output.dtype) << 16 | measure << 24
    launch(
        collective_kernel, max(1, min(-(-share // (squares.TILE.value if measure else 1)), PROGRAMS)), source.device,
        tuple(shared), tuple(sources), tuple(targets), numel, -1 if one_shot else place,
        struct.unpack("q", struct.pack("d", factor))[0], statistics, found_inf, status.data_ptr(),
        KINDS.index(kind), ELEMENTS[source.dtype], ELEMENTS[output.dtype],
        16 // max(source.itemsize, output.itemsize) if aligned else 1, rank, ranks, one_shot, what, num_warps=WARPS,
    )  # fmt: skip
    written([t for t in (output, statistics, found_inf) if t is not None])
