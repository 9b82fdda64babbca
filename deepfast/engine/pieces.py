"""Weights of which each rank has its rows, before there is an engine (``zero.Init``).

Such a parameter is a meta tensor; its rows hang on that tensor's storage, so that views of it and its ``.data`` lead to
them, too. They are those that ``fully_shard`` gives this rank later: ``torch.chunk`` along dimension 0, over all ranks.
"""

from __future__ import annotations

import copy
import enum
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deepfast.comm.by_torch import gather_tensor


class ZeroParamStatus(enum.Enum):
    """Where a parameter is: a part on each rank, or (within ``GatheredParameters``) whole."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_numbers = itertools.count()


def mark(p: Tensor, status: ZeroParamStatus = ZeroParamStatus.NOT_AVAILABLE) -> None:
    """Gives a parameter that lies in parts the attributes by which scripts know it: ``ds_id``, ``ds_shape``, …"""
    known: Any = p
    if not hasattr(p, "ds_id"):
        known.ds_id, known.ds_shape, known.ds_numel = next(_numbers), p.shape, p.numel()
    known.ds_status = status


def unmark(p: Tensor) -> None:
    for name in ("ds_id", "ds_shape", "ds_numel", "ds_status"):
        vars(p).pop(name, None)


def _as_bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def _wire(t: Tensor) -> torch.device:
    """Where torch.distributed takes it."""
    if "nccl" in dist.get_backend() and t.device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return t.device


class Piece:
    """This rank's rows of a tensor.

    Args:
        shape: of the whole tensor, at least one dimension.

    Attributes:
        padded: contiguous; the rows, and zeros up to as many as the first rank has.
    """

    def __init__(self, padded: Tensor, shape: torch.Size) -> None:
        self.padded, self.shape = padded, shape

    @classmethod
    def of(cls, whole: Tensor, source: int | None = 0) -> Piece:
        """Of the contiguous tensor that rank ``source`` has; None: of this rank's own."""
        piece = cls(whole, whole.shape)
        piece.set(whole, source)
        return piece

    def _rows(self, rank: int) -> tuple[int, int, int]:
        """Where a rank's rows begin and end, and how many the first one has."""
        rows, most = self.shape[0], -(-self.shape[0] // dist.get_world_size())
        return min(rank * most, rows), min((rank + 1) * most, rows), most

    def _cut(self, whole: Tensor, rank: int) -> Tensor:
        begin, end, most = self._rows(rank)
        if end - begin == most:
            return whole[begin:end]
        padded = whole.new_zeros((most, *self.shape[1:]))
        padded[: end - begin] = whole[begin:end]
        return padded

    @property
    def shard(self) -> Tensor:
        begin, end, _ = self._rows(dist.get_rank())
        return self.padded[: end - begin]

    def set(self, whole: Tensor, source: int | None) -> None:
        """Takes its rows from what rank ``source`` has (all ranks call it); None: from this rank's own."""
        whole = whole.detach()
        mine = torch.empty_like(self._cut(whole, dist.get_rank()), memory_format=torch.contiguous_format)
        if source is None:
            mine.copy_(self._cut(whole, dist.get_rank()))
        else:
            received = _as_bytes(mine).to(_wire(mine))
            parts = None
            if dist.get_rank() == source:
                parts = [_as_bytes(self._cut(whole, r)).to(received.device) for r in range(dist.get_world_size())]
            dist.scatter(received, parts, source)
            _as_bytes(mine).copy_(received)
        self.padded = mine

    def gather(self) -> Tensor:
        """The whole tensor, from all ranks, which all call it."""
        most = self.padded.shape[0]
        out = self.padded.new_empty((most * dist.get_world_size(), *self.shape[1:]))
        received = _as_bytes(out).to(_wire(out))
        gather_tensor(received, _as_bytes(self.padded).to(received.device))
        _as_bytes(out).copy_(received)
        return out[: self.shape[0]]

    def empty(self) -> Tensor:
        """Memory for the whole tensor."""
        return torch.empty(self.shape, dtype=self.padded.dtype, device=self.padded.device)

    def is_all(self, t: Tensor) -> bool:
        """Whether a view of the whole tensor is all of it, as it is."""
        return t.shape == self.shape and t.dtype == self.padded.dtype and t.is_contiguous()

    def meta(self) -> Tensor:
        """What stands for the whole tensor."""
        t = torch.empty(self.shape, dtype=self.padded.dtype, device="meta")
        t.untyped_storage()._deepfast_piece = self  # type: ignore[attr-defined]
        return t


def piece_of(t: Tensor) -> Piece | None:
    """The rows behind a parameter, its ``.data`` or a view of it; None for any other tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        if not t.is_meta or t.layout != torch.strided:
            return None
        return getattr(t.untyped_storage(), "_deepfast_piece", None)


def exchange(p: Any, other: Tensor) -> None:
    """Gives ``p`` the memory of ``other``, which gets that of ``p``; whoever has ``p`` sees that.

    Raises:
        RuntimeError: where a graph needs what ``p`` is now.
    """
    if p._use_count() > 1:
        raise RuntimeError(
            f"zero: a parameter of shape {tuple(p.shape)} is used by a graph that is alive: delete its outputs first"
        )
    torch._C._swap_tensor_impl(p, other)


def hold(p: Tensor, piece: Piece) -> None:
    """Makes a parameter that is whole one that lies in parts."""
    exchange(p, nn.Parameter(piece.meta(), requires_grad=p.requires_grad))
    p.__class__ = Held
    p._is_param = True  # to isinstance(p, nn.Parameter)
    mark(p)


def let_go(p: Tensor, whole: Tensor) -> None:
    """The other way: ``p`` is an ordinary parameter, with the value ``whole``."""
    p.__class__ = nn.Parameter
    try:
        exchange(p, nn.Parameter(whole.detach(), requires_grad=p.requires_grad))
    except RuntimeError:
        p.__class__ = Held
        raise
    vars(p).pop("_is_param", None)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return [t for t in found if isinstance(t, Tensor)]


# Operations that look at shape and type alone, and those that set all that they are given first
UNREAD = frozenset(
    "new_empty new_empty_strided new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like "
    "randn_like randint_like".split()
)
FILLS = frozenset("zero_ fill_ copy_ normal_ uniform_ random_ exponential_ log_normal_ cauchy_ geometric_".split())


class Watch(TorchDispatchMode):
    """Sees operations on weights that lie in parts; views of those are views of meta tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and piece_of(t) is not None]
        if not held or getattr(func, "is_view", False):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        piece: Any = piece_of(held[0])
        if name == "_to_copy" and piece.is_all(held[0]):
            return self._converted(piece, held[0], **kwargs)
        return self.held(func, name, held, args, kwargs)

    @staticmethod
    def _converted(piece: Piece, t: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        """``.to(...)``: of another type, the rows elsewhere; it still lies in parts. (On "meta", nothing is left.)"""
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(t.shape, dtype=dtype or t.dtype, device="meta")
        return Piece(piece.padded.to(device=device, dtype=dtype, copy=True), piece.shape).meta()

    def held(self, func: Any, name: str, held: list[Tensor], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class Refuses(Watch):
    """Outside of ``zero.Init``: ranks need not do the same, so nothing that needs other ranks is done."""

    def held(self, func: Any, name: str, held: list[Tensor], args: Any, kwargs: Any) -> Any:
        if name in UNREAD:
            return func(*args, **kwargs)
        if name == "copy_":
            to, source = args[:2]
            piece = piece_of(to)
            if piece is None and to.is_meta:  # nothing is read: fully_shard lays out what it will have
                return func(*args, **kwargs)
            if piece is not None and piece.is_all(to) and source.shape == to.shape and not source.is_meta:
                value = source.to(piece.padded)  # load_state_dict
                piece.set(value.contiguous(), None)
                return to
        raise refusal(name, held[0])


def refusal(name: str, t: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{name}: a weight of shape {tuple(t.shape)} lies in parts over the ranks: enter "
        "deepspeed.zero.GatheredParameters(...) to use it, or deepspeed.zero.Init() to make a model"
    )


class Building(Watch):
    """Within ``zero.Init``: a weight comes together for the operation that uses it; what is written is rank 0's."""

    now: Building | None = None  # the one that is open

    def held(self, func: Any, name: str, held: list[Tensor], args: Any, kwargs: Any) -> Any:
        if name in ("set_", "resize_"):
            raise RuntimeError(f"zero.Init: {name} on a weight of shape {tuple(held[0].shape)}, which lies in parts")
        first = args[0] if args else None
        unread = name in UNREAD or (name in FILLS and len(held) == 1 and held[0] is first and _is_all(first))
        return on_memory(func, held, args, kwargs, written(func, args, kwargs), unread)


def _is_all(t: Tensor) -> bool:
    piece = piece_of(t)
    return piece is not None and piece.is_all(t)


def on_memory(
    func: Any, held: list[Tensor], args: Any, kwargs: Any, changed: list[Tensor], unread: bool = False
) -> Any:
    """``func`` with the whole weights in the place of ``held``, those of them that lie in parts; all ranks call it.

    Args:
        changed: what func writes to: rank 0's result is cut.
        unread: the values are not needed.
    """
    wholes: dict[Any, Tensor] = {}
    for piece in map(piece_of, held):
        if piece is not None and piece not in wholes:
            wholes[piece] = piece.empty() if unread else piece.gather()
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def real(t: Tensor) -> Tensor:
        piece = piece_of(t)
        if piece is None:
            return t
        alike = torch.empty(0, dtype=t.dtype, device=wholes[piece].device)
        there = alike.set_(wholes[piece].untyped_storage(), t.storage_offset(), t.shape, t.stride())
        made[id(there)] = (there, t)
        return there

    result = func(*tree_map_only(Tensor, real, args), **tree_map_only(Tensor, real, kwargs))
    for piece in dict.fromkeys(map(piece_of, changed)):
        if piece is not None:
            piece.set(wholes[piece], 0)
    return tree_map_only(Tensor, lambda t: made.get(id(t), (t, t))[1], result)


# They reach memory without an operation, or make tensors where they believe that the weight is
_PAST = ("__setitem__", "__reduce_ex__", "numpy", "tolist", "__array__", "__dlpack__")
_PLACE = (Tensor.device, Tensor.is_meta, Tensor.is_cpu, Tensor.is_cuda)


class Held(Tensor):
    """A parameter that lies in parts, its ``.data``, or a view of it: has a shape and a type; no value of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return cls._answer(func, args, kwargs or {})

    @classmethod
    def _answer(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        building, name, about = Building.now is not None, getattr(func, "__name__", ""), getattr(func, "__self__", None)
        piece = piece_of(args[0]) if args and isinstance(args[0], Tensor) else None
        # Constructors put other tensors where their weights are; fully_shard is to see what they really are
        if piece is not None and any(about is place for place in _PLACE) and (building or about is Tensor.is_meta):
            return func(piece.padded)
        if about is Tensor.data and name == "__set__" and not args[1].is_meta:
            return let_go(args[0], args[1])  # another tensor in its place, whole
        if piece is not None and (name in _PAST or (name == "__getitem__" and _gathers(args[1]))):
            if not building:
                raise refusal(name, args[0])
            held = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            return on_memory(func, held, args, kwargs, args[:1] if name == "__setitem__" else [])
        if building:
            result = func(*args, **kwargs)
        else:
            with Refuses():
                result = func(*args, **kwargs)
        return tree_map_only(Tensor, _covered, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """One with rows of its own; no other rank is asked."""
        if id(self) in memo:
            return memo[id(self)]
        piece = piece_of(self)
        with torch._C.DisableTorchFunctionSubclass():
            if piece is None or not piece.is_all(self):
                raise refusal("deepcopy", self)
            known: Any = nn.Parameter(Piece(piece.padded.clone(), piece.shape).meta(), requires_grad=self.requires_grad)
        known.__class__ = Held
        memo[id(self)] = known
        vars(known).update({k: v for k, v in copy.deepcopy(vars(self), memo).items() if k != "ds_id"})
        mark(known)
        return known


def _gathers(index: Any) -> bool:
    """Whether it takes elements by their numbers, into a tensor of its own."""
    return any(
        not isinstance(i, (int, slice, type(None), type(...)))
        for i in (index if isinstance(index, tuple) else (index,))
    )


def _covered(t: Tensor) -> Tensor:
    return t.as_subclass(Held) if type(t) is Tensor and piece_of(t) is not None else t
