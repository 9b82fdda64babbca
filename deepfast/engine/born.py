"""Modules made in parts: when a constructor is done, its weights are cut, and each rank keeps its rows (``zero.Init``).

So a model can be made that no rank has room for. Rank 0's values are everybody's. What a constructor does to weights
that are cut already (``self.apply(init)``, ``nn.init.normal_(child.weight)``) is seen operation by operation
(``pieces.py``): the weights come out as if they had been made whole, with as many random numbers drawn on each rank.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepfast.engine.pieces import Building, Piece, hold, let_go, mark, piece_of, unmark
from deepfast.optim.shards import Shards

__all__ = ["Births", "any_in", "cut", "is_born", "make_whole", "mark", "settle", "shard_of"]


def is_born(p: Tensor) -> bool:
    """Whether ``p`` lies in parts, and no engine has it yet."""
    return piece_of(p) is not None


def any_in(module: nn.Module) -> bool:
    return any(map(is_born, module.parameters()))


def shard_of(p: Tensor) -> Tensor:
    """This rank's rows; the very memory.

    Raises:
        ValueError: if ``p`` is not one that lies in parts.
    """
    piece = piece_of(p)
    if piece is None:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} was not made within zero.Init")
    return piece.shard


def _can_be_cut(p: Tensor) -> bool:
    """What ``fully_shard`` would cut. (Parameters of other classes have a meaning of their own.)"""
    ordinary = type(p) is nn.Parameter and p.layout == torch.strided and not p.is_meta
    return ordinary and p.ndim > 0 and p.numel() > 0 and p.is_floating_point() and p.is_contiguous()


@torch.no_grad()
def cut(module: nn.Module) -> None:
    """Cuts what is whole in a module; rank 0's values are taken. All ranks call it, unless there is only one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for p in module.parameters():
        # A graph (a forward pass in the constructor) needs it as it is: later
        if _can_be_cut(p) and p not in opened and p._use_count() == 1:  # type: ignore[attr-defined]
            hold(p, Piece.of(p))


opened: dict[Tensor, Any] = {}  # what GatheredParameters has made whole, for as long as it has


def _all_classes() -> Iterator[type[nn.Module]]:
    seen, ahead = set(), [nn.Module]
    while ahead:
        kind = ahead.pop()
        if kind not in seen:
            seen.add(kind)
            yield kind
            ahead += kind.__subclasses__()


class Births:
    """A context in which modules are made in parts. All ranks make the same ones, in the same order.

    What is whole at its end (a constructor is still in use by a graph, a weight was replaced) is cut then; an error
    leaves everything as it is, and the classes as they were.
    """

    def __init__(self) -> None:
        self._constructors: dict[type[nn.Module], Any] = {}
        self._running: set[int] = set()
        self._made: list[weakref.ref[nn.Module]] = []
        self._watch = Building()

    def __enter__(self) -> Births:
        for kind in _all_classes():
            self._follow(kind)
        follow = self._follow

        def subclassed(cls: type[nn.Module], **options: Any) -> None:
            super(nn.Module, cls).__init_subclass__(**options)
            follow(cls)

        nn.Module.__init_subclass__ = classmethod(subclassed)  # type: ignore[assignment]
        self._watch.__enter__()
        Building.now = self._watch
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        Building.now = None
        self._watch.__exit__(kind, *exception)
        del nn.Module.__init_subclass__
        for cls, constructor in self._constructors.items():
            cls.__init__ = constructor  # type: ignore[method-assign]
        if kind is None:
            for module in [known for ref in self._made if (known := ref()) is not None]:
                cut(module)

    def _follow(self, kind: type[nn.Module]) -> None:
        constructor = vars(kind).get("__init__")
        if constructor is not None:
            self._constructors[kind] = constructor
            kind.__init__ = self._cutting(constructor)  # type: ignore[method-assign]

    def _cutting(self, constructor: Callable[..., None]) -> Callable[..., None]:
        """The constructor; where it was not called by a subclass's, what it has made is cut after it."""

        @functools.wraps(constructor)
        def made(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if id(module) in self._running:
                return constructor(module, *args, **kwargs)
            self._running.add(id(module))
            try:
                constructor(module, *args, **kwargs)
            finally:
                self._running.discard(id(module))
            if "_parameters" in vars(module):
                self._made.append(weakref.ref(module))
                cut(module)
            return None

        return made


@torch.no_grad()
def settle(module: nn.Module, renamed: Mapping[Tensor, Tensor], device: torch.device) -> None:
    """Gives the weights of a module that was born, and has been given to ``fully_shard``, their rows.

    Args:
        module: its weights are DTensors, without memory where they were born. What else it has is moved to ``device``.
        renamed: {what the parameters were: the DTensors that have taken their place}, which stay the same objects.

    Raises:
        ValueError: where ``fully_shard`` has cut otherwise, and where a weight has none of what it needs.
    """
    rows = {id(new): piece for old, new in renamed.items() if (piece := piece_of(old)) is not None}

    def placed(t: Any) -> Tensor:
        piece = rows.pop(id(t), None)
        if piece is None:
            return t.detach().to(device)
        shards = Shards.of(t)
        if shards is None or (t._local_tensor.shape, t.dtype) != (piece.shard.shape, piece.padded.dtype):
            raise ValueError(f"a parameter of shape {tuple(t.shape)} is not cut into rows over all ranks")
        return shards.wrap(piece.padded.to(device)[: len(piece.shard)], t)

    if rows:
        module._apply(placed)  # as to_empty() does, which FSDP expects
    if rows:
        raise ValueError(f"{len(rows)} parameters made within zero.Init are not in the module")
    for p in module.parameters():
        if Shards.of(p) is not None:
            mark(p)


@torch.no_grad()
def make_whole(module: nn.Module, device: torch.device) -> None:
    """Makes a module that was born an ordinary one, on every rank."""
    for p in module.parameters():
        piece = piece_of(p)
        if piece is not None:
            let_go(p, piece.gather().to(device).clone())
            unmark(p)
