"""The optimizers for arrays of any library that speaks DLPack (NumPy, JAX, CuPy, torch), in the memory they lie in.

    optimizer = deepfast.functional.Optimizer(deepfast.AdamW, lr=1e-3, max_grad_norm=1.0)
    state = optimizer.init(params)
    params, state = optimizer.update(grads, state, params)  # new arrays: JAX, or any other
    optimizer.update_(grads, state, params)  # in place: NumPy, CuPy, torch

``params`` and ``grads`` are an array, or mappings, lists and tuples of such, however nested; fp32, fp16, bf16 or fp64.
"""

from __future__ import annotations

import dataclasses
from collections import abc, defaultdict
from typing import Any

import torch

from deepfast import optim
from deepfast.optim.hyper import require


@dataclasses.dataclass
class State:
    """What an optimizer keeps of some arrays. ``update`` uses it up: ``copy.deepcopy`` one that you may go back to."""

    optimizer: Any  # deepfast's: it has state_dict(), load_state_dict() and grad_norm. None: used up
    places: list[str]  # of its parameters: "['layers'][0]"


class Optimizer:
    """A class of deepfast's, and its options (but reset_grad: gradients are only read)."""

    def __init__(self, kind: type[optim.Optimizer], **options: Any) -> None:
        given = kind if isinstance(kind, type) else f"an object of {type(kind)}"
        if given is not kind or not issubclass(kind, optim.Optimizer):
            raise TypeError(f"deepfast: functional.Optimizer takes a class like deepfast.AdamW, not {given}")
        require(not options.get("reset_grad"), "deepfast: functional.Optimizer only reads gradients: no reset_grad")
        self._kind, self._options = kind, options

    def init(self, params: Any) -> State:
        """The state before the first step. Raises ValueError for what is no array of floats."""
        views = _views("params", params)
        return State(self._kind(map(torch.nn.Parameter, views.values()), **self._options), list(views))

    def update(self, grads: Any, state: State, params: Any, *, lr: float | None = None) -> tuple[Any, State]:
        """New arrays of the same library, nested alike, and the state to go on with; the given ones stay as they are.

        grads: of the shapes, dtypes and devices of ``params``. lr: the learning rate from this step on. Raises
        ValueError for arrays that cannot be read, or do not fit, before anything has changed.
        """
        weights = {place: t.clone() for place, t in _views("params", params).items()}
        _step(grads, state, weights, lr)
        kept, state.optimizer = State(state.optimizer, state.places), None
        return _mapped(lambda place, array: _library(array).from_dlpack(weights[place]), params), kept

    def update_(self, grads: Any, state: State, params: Any, *, lr: float | None = None) -> None:
        """``update`` in place. Raises ValueError for arrays that are read-only, too."""
        _step(grads, state, _views("params", params, written=True), lr)


def _step(grads: Any, state: State, weights: dict[str, torch.Tensor], lr: float | None) -> None:
    optimizer, slopes = state.optimizer, _views("grads", grads)
    require(optimizer is not None, "deepfast: this state was used up by update(): go on with the one that it returned")
    own = dict(zip(state.places, optimizer.param_groups[0]["params"], strict=True))
    for role, given in (("params", weights), ("grads", slopes)):
        for place, what in ((p, w) for p in sorted(own.keys() | given.keys()) for w in ("shape", "dtype", "device")):
            now, before = (getattr(tensors.get(place), what, "missing") for tensors in (given, own))
            require(now == before, f"deepfast: {role}{place}: its {what} is {now}, and for init() it was {before}")
    for place, p in own.items():
        p.data, p.grad = weights[place], slopes[place]
    if optimizer.master == "fp32":
        optimizer.refresh_master()  # nobody tells whether the arrays were written to since
    optimizer.param_groups[0].update({} if lr is None else {"lr": float(lr)})
    optimizer.step()
    optimizer.zero_grad()


def _views(role: str, tree: Any, written: bool = False) -> dict[str, torch.Tensor]:
    """The arrays' memory as tensors, by their places."""
    found: dict[str, Any] = {}
    _mapped(found.setdefault, tree)
    for place, array in found.items():
        flags = getattr(array, "flags", isinstance(array, torch.Tensor))  # JAX has none, CuPy none of writing
        try:  # torch itself would write to what is read-only, die of negative strides, and take a list for a capsule
            require(hasattr(array, "__dlpack_device__"), f"{type(array).__name__} has no DLPack, as all within jax.jit")
            require(not written or getattr(flags, "writeable", bool(flags)), "read-only: copy it, or take update()")
            require(min(getattr(array, "strides", None) or [0]) >= 0, "it lies backwards in memory: copy it")
            found[place] = t = torch.from_dlpack(array)
            require(t.is_floating_point() and t.itemsize > 1, f"{t.dtype} is none of fp32, fp16, bf16 and fp64")
        except Exception as error:
            raise ValueError(f"deepfast: {role}{place}: {error}".splitlines()[0]) from None
    return found


def _mapped(call: Any, tree: Any, place: str = "") -> Any:
    """``tree`` with ``call(place, array)`` for each array, called by the order of keys. (Named tuples have _make.)"""
    kind: Any = type(tree)
    if isinstance(tree, abc.Mapping):
        new = {key: _mapped(call, tree[key], f"{place}[{key!r}]") for key in sorted(tree, key=str)}
        return kind(*([tree.default_factory] if isinstance(tree, defaultdict) else []), {key: new[key] for key in tree})
    if isinstance(tree, (list, tuple)):
        return getattr(kind, "_make", kind)(_mapped(call, child, f"{place}[{i}]") for i, child in enumerate(tree))
    return call(place, tree)


def _library(array: Any) -> Any:
    return getattr(array, "__array_namespace__", lambda: __import__(type(array).__module__.partition(".")[0]))()
