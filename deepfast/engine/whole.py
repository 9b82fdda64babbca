"""Weights in parts made whole for a while, and cut again (``zero.GatheredParameters``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from deepfast.engine.born import opened
from deepfast.engine.pieces import Piece, ZeroParamStatus, hold, let_go, mark, piece_of, unmark


def _same(a: Tensor, b: Tensor) -> bool:
    """To the bit."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


class Gathered(DTensor):
    """A DTensor that is used as if it were an ordinary parameter: its value, whole.

    It is the object that everybody has; its class is this one for a while. ``p.grad`` stays the part's.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.grad:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        used: dict[int, Gathered] = {}

        def whole(p: Gathered) -> Tensor:
            known = opened[p].whole
            used[id(known)] = p
            return known

        result = func(*tree_map_only(Gathered, whole, args), **tree_map_only(Gathered, whole, kwargs or {}))
        return tree_map_only(Tensor, lambda t: used.get(id(t), t), result)

    def full_tensor(self, **_: Any) -> Tensor:
        return opened[self].whole.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return opened[self].whole.__deepcopy__(memo)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(opened[self].whole)


class _Part:
    """A parameter of an engine: a DTensor."""

    def __init__(self, p: Any) -> None:
        self.p = p
        value = p.detach().full_tensor()
        if value.untyped_storage().data_ptr() == p._local_tensor.untyped_storage().data_ptr():
            value = value.clone()  # of one rank
        self.whole = nn.Parameter(value, requires_grad=p.requires_grad)
        p.__class__ = Gathered

    def _own(self) -> Any:
        p = self.p
        return distribute_tensor(self.whole.detach(), p.device_mesh, p.placements, src_data_rank=None)

    def is_changed(self) -> bool:
        return not _same(self._own()._local_tensor, self.p._local_tensor)

    def write(self, source: int | None) -> None:
        """Takes its part of what rank ``source`` has; None: of what this rank has."""
        if source is not None:
            dist.broadcast(self.whole.data, source)
        if self.is_changed():
            own = self._own()
            with torch._C.DisableTorchFunctionSubclass():
                self.p.copy_(own)  # an optimizer has to notice

    def close(self) -> None:
        self.p.__class__ = DTensor
        self.p.requires_grad_(self.whole.requires_grad)


class _Piece:
    """A parameter of a module that no engine has yet: it really is an ordinary one for a while."""

    def __init__(self, p: Tensor) -> None:
        self.p = p
        piece: Any = piece_of(p)
        self.piece: Piece = piece
        let_go(p, piece.gather())

    @property
    def whole(self) -> Tensor:
        return self.p.data

    def is_changed(self) -> bool:
        return not _same(Piece.of(self.whole.contiguous(), None).padded, self.piece.padded)

    def write(self, source: int | None) -> None:
        self.piece.set(self.whole.contiguous(), source)

    def close(self) -> None:
        hold(self.p, self.piece)


class _Ordinary:
    """A parameter that is whole on every rank, or within another such context."""

    def __init__(self, p: Tensor) -> None:
        self.p = p

    @property
    def whole(self) -> Tensor:
        return self.p.detach()

    def is_changed(self) -> bool:
        return False  # whoever changed it has changed it

    def write(self, source: int | None) -> None:
        if source is None or not dist.is_initialized():
            return
        # Through a copy: an optimizer that keeps a master has to notice that somebody wrote.
        value = self.whole.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, source)
        if dist.get_rank() != source:
            self.p.copy_(value)

    def close(self) -> None:
        pass


class Whole:
    """Makes parameters whole; all ranks do so. The objects that everybody has are then ordinary parameters."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(dict.fromkeys(params))
        self._items: list[_Part | _Piece | _Ordinary] = []

    @torch.no_grad()
    def open(self) -> None:
        for p in self._params:
            if piece_of(p) is not None:
                opened[p] = _Piece(p)
            elif type(p) is DTensor:
                opened[p] = _Part(p)
            else:  # within another context, too
                self._items.append(_Ordinary(p))
                continue
            self._items.append(opened[p])
            mark(p, ZeroParamStatus.AVAILABLE)

    @torch.no_grad()
    def close(self, source: int | None, keep: bool) -> bool:
        """Cuts them again.

        Args:
            source: the rank whose values are taken; None: what all ranks have made of them in the same way.
            keep: False: nothing is taken.

        Raises:
            RuntimeError: where a graph needs a parameter as it is; it stays whole.

        Returns:
            False if there were changes that are dropped: without a source, ranks have made different ones.
        """
        agreed = True
        try:
            if keep and source is None:
                keep, agreed = self._changed()
            if keep:
                for item in self._items:
                    item.write(source)
        finally:
            failures = [error for item in self._items if (error := self._cut(item)) is not None]
            self._items = []
        if failures:
            raise failures[0]
        return agreed

    @staticmethod
    def _cut(item: _Part | _Piece | _Ordinary) -> RuntimeError | None:
        if isinstance(item, _Ordinary):
            return None
        del opened[item.p]
        try:
            item.close()
        except RuntimeError as error:  # it stays whole
            unmark(item.p)
            return error
        mark(item.p)
        return None

    def _changed(self) -> tuple[bool, bool]:
        """Whether there is something to be taken, and whether all have made the same changes, if any."""
        parts = [item for item in self._items if not isinstance(item, _Ordinary)]
        if not parts:
            return False, True
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, any(item.is_changed() for item in parts))
        if not any(said):
            return False, True
        digest = hashlib.sha256()
        for item in parts:
            digest.update(item.whole.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        dist.all_gather_object(said, digest.hexdigest())
        return len(set(said)) == 1, len(set(said)) == 1
