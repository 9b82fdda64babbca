"""What an optimizer keeps of each parameter: which tensors, of which type, where they lie, what they begin with."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepfast import graphs, ops, reference
from deepfast.optim import memory
from deepfast.optim.declared import Declared
from deepfast.optim.options import MASTERS, MOMENTS
from deepfast.optim.shards import Shards, copy_into, is_sharded, local
from deepfast.reference import RULES

HALF = frozenset((torch.float16, torch.bfloat16))
_MOMENT_NAMES = frozenset(name for rule in RULES.values() for name in rule.keeps)
_FORMS = ops.KERNEL_DTYPES | {torch.int16} | reference.GROUPED


class Stateful(Declared):
    """The second layer of :class:`deepfast.optim.Optimizer`: state is made where it is missing, and mended."""

    _given: dict[Tensor, Tensor]  # fp32 values of parameters that have no state yet

    def init_state(self) -> None:
        """Allocates the state of every parameter that has none yet, as its first step would, without stepping.

        Not of frozen ones, which have no step.
        """
        self._init_state((p, group) for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _init_state(self, wanted: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """Allocates what the given parameters' state lacks."""
        missing: dict[Any, list[Tensor]] = defaultdict(list)
        for p, group in wanted:
            state = self.state.get(p, {})
            if not self.keeps_master(p):
                state.pop("master", None)  # a model that was cast to fp32 is its own master
            for name in (*self._moments(group), "master", "step"):
                if (mended := self._mended(name, state.get(name), p)) is not state.get(name):
                    state[name] = mended
            for name, dtype, initial in self._absent(p, group):
                missing[p.device, name, dtype, initial, _is_special(p) and name != "step"].append(p)
        if any(graphs.capturing(device) for device, *_ in missing):
            raise RuntimeError(
                "deepfast: state that is made while a graph is captured would begin anew at each replay: step once "
                "before the capture"
            )
        for (device, name, dtype, initial, alone), params in missing.items():
            like = [_model(p, name, dtype) for p in params]
            beside = None if name == "step" else functools.partial(self._streams, params)
            if alone:
                views = [
                    _zeros_like(t, dtype, device, functools.partial(self._streams, params, nth))
                    for nth, t in enumerate(like)
                ]
            else:
                views = memory.zeros_like_each(like, dtype, device, beside)
            for p, t in zip(params, views, strict=True):
                if name == "master":
                    self._fill_master(p, t)
                elif dtype in reference.GROUPED:
                    _count_as_it_lies(t, p)
                    if initial:  # else it is that already
                        fill_grouped(t, torch.full(local(p).shape, initial, device=device), p)
                elif initial:
                    t.fill_(complex(initial, initial) if dtype.is_complex else initial)
                self.state[p][name] = wrapped(t, p) if alone else t

    def _streams(self, params: list[Tensor], nth: int) -> list[Tensor]:
        """What a step of the nth of ``params`` walks side by side, so far as it is there."""
        p = params[nth]
        streams = (p, p.grad, *(t for name, t in self.state.get(p, {}).items() if name != "step"))
        shards = [local(t) for t in streams if isinstance(t, Tensor)]
        return [t for t in shards if t.device.type == "cpu" and t.layout is torch.strided and not is_wrapper(t)]

    def _absent(self, p: Tensor, group: dict[str, Any]) -> Iterator[tuple[str, torch.dtype, float]]:
        """What the state of ``p`` lacks: name, dtype, and the value it begins with."""
        state = self.state.get(p, {})
        if (dtype := self._dtype_of("master", p)) is not None and state.get("master") is None:
            yield "master", dtype, 0.0
        moments = [name for name in self._moments(group) if state.get(name) is None]
        for name in moments:
            dtype = self._dtype_of(name, p)
            yield name, dtype or p.dtype, self._initial(group)
        # Where no moment is left, the parameter begins anew.
        if self._counts_steps(group):
            if len(moments) == len(self._moments(group)):
                yield "step", _count_dtype(p), 0.0
            elif state.get("step") is None:
                yield "step", _count_dtype(p), float(self._steps_of(state, group))

    def _steps_of(self, values: dict[str, Any], group: dict[str, Any]) -> Any:
        """How many steps the moments in ``values`` have seen. (apex, and its like, count in the group.)"""
        for count in (values.get("step"), group.get("step"), self._uncounted):
            if count is not None:
                return count
        if not RULES[self._rule(group)].counts_steps:
            return 0
        raise ValueError(
            f"deepfast: a state of {type(self).__name__} has {', '.join(values)} but no 'step', nor has its group: put "
            "there how many steps it has seen"
        )

    def _has_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        state = self.state.get(p, {})
        whole = next(self._absent(p, group), None) is None and ("master" in state) == self.keeps_master(p)
        names = (*self._moments(group), "master", "step")
        return whole and all(self._mended(name, state.get(name), p) is state.get(name) for name in names)

    def keeps_master(self, p: Tensor) -> bool:
        """Whether more is known of ``p`` than its 16 bits show."""
        return self._dtype_of("master", p) is not None

    def _dtype_of(self, name: str, p: Tensor) -> torch.dtype | None:
        """In which type ``name`` of the state of ``p`` is kept; None for a master that is not."""
        if name == "master":
            split = MASTERS[self.master] if p.dtype in HALF else None
            return torch.float32 if split is not None and is_wrapper(local(p)) else split
        if p.is_complex() or p.dtype == torch.float64:
            return p.dtype
        form = self._form(name)
        if form == "int8":
            return torch.float32 if is_wrapper(local(p)) else reference.grouped_dtype(name)
        return MOMENTS[form] or p.dtype

    def _mended(self, name: str, value: Any, p: Tensor) -> Any:
        """A value of the state of ``p``, itself if ``p`` can use it; None if there is none."""
        if value is None or (isinstance(value, Tensor) and value.is_meta and not p.is_meta):  # it has got memory since
            return None
        if name == "step":
            return value if _is_count(value, p) else torch.tensor(float(value), dtype=_count_dtype(p), device=p.device)
        dtype = self._dtype_of(name, p)
        known = value.dtype in _FORMS and p.dtype in ops.KERNEL_DTYPES
        grouped = is_grouped(name, value)
        if dtype not in (None, value.dtype) and (known or grouped):
            value = _converted(name, value, p, dtype)
        elif grouped and _order(value, p) != reference.order_of(local(p)):
            value = _converted(name, value, p, value.dtype)
        return value if _is_special(p) or graphs.capturing(p.device) else memory.in_order_of(value, p)

    @torch.no_grad()
    def get_master(self, p: Tensor) -> Tensor:
        """fp32, of the shape of ``p``: what it is in full, as far as that is known, in a new tensor."""
        if p not in self.state:
            self._check_own(p)
        weight, shards = local(p).detach(), Shards.of(p)
        master = self.state.get(p, {}).get("master")
        known = self._given.get(p) if master is None else reference.master_value(local(master), weight)
        wide = (weight.float() if known is None else known).clone()
        if known is not None:
            reference.refresh(wide, weight)  # somebody may have written to it
        return wide if shards is None else shards.wrap(wide, p)

    @torch.no_grad()
    def set_master(self, p: Tensor, value: Tensor) -> None:
        """Gives a 16-bit parameter the fp32 ``value``: the parameter becomes that rounded, its master knows the rest.

        As when a model is cast to 16 bits, and training shall start from what it was. Where there is no state so far,
        the value is kept until there is. Without a master, and of other parameters, the parameter alone is written.

        Args:
            p: one of the optimizer's.
            value: of its shape.
        """
        self._check_own(p)
        if torch.as_tensor(value).shape != p.shape:
            got = tuple(torch.as_tensor(value).shape)
            raise ValueError(f"deepfast: set_master(): a parameter of shape {tuple(p.shape)} and a value of {got}")
        weight, shards = local(p), Shards.of(p)
        if not self.keeps_master(p):
            copy_into(p, value)
            return
        wide = torch.empty_like(weight, dtype=torch.float32)
        copy_into(wide if shards is None else shards.wrap(wide, p), value)
        weight.copy_(reference.round_master(wide, p.dtype))
        self._given[p] = wide
        if (master := self.state.get(p, {}).get("master")) is not None:
            self._fill_master(p, local(master))

    def _check_own(self, p: Tensor) -> None:
        if not any(q is p for q in self._params()):
            what = f"a parameter of shape {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p)
            raise ValueError(f"deepfast: {what} is not in the optimizer's groups")

    def _fill_master(self, p: Tensor, master: Tensor) -> None:
        """A new master begins at what was given for it, where that is still what the weight is, or at the weight."""
        wide, weight = self._given.pop(p, None), local(p).detach()
        if wide is not None and wide.shape == weight.shape:
            reference.refresh(wide, weight)
            master.copy_(reference.master_of(wide, p.dtype, master.dtype))
        elif master.dtype == torch.float32:
            master.copy_(weight)
        else:
            master.zero_()  # nothing is lacking

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Takes over parameters that were written from outside.

        The next step does so by itself, of those that were written in place (``model.load_state_dict``, ``p.clamp_()``)
        or given other memory; what was written past autograd's eyes (``p.data``) it does not see. A split master
        cannot tell which elements were written: those keep what it has beside them, at most half a unit in the 16-bit
        parameter's last place, which no one sees.
        """
        for p in self._params():
            state = self.state.get(p, {})
            if "master" in state:
                master, weight = local(state["master"]), local(p)
                reference.refresh(master, weight)


def is_wrapper(t: Tensor) -> bool:
    """Whether ``t`` is of a class that does its own arithmetic (a quantized tensor, say) and has no memory to read."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _is_special(p: Tensor) -> bool:
    """Whether state like ``p`` is allocated by itself (a DTensor around a part of something cannot be deep-copied)."""
    return is_sharded(p) or is_wrapper(p)


def _is_count(step: Any, p: Tensor) -> bool:
    known = (torch.float32,) if p.dtype in ops.KERNEL_DTYPES else (torch.float32, torch.float64)
    return isinstance(step, Tensor) and step.dtype in known and step.numel() == 1 and step.device == p.device


def _model(p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape, and in the order, that a value of the state of ``p`` has on this rank."""
    if name == "step":
        return torch.empty((), device="meta")
    if dtype in reference.GROUPED:
        return local(p).new_empty(reference.packed_size(local(p).numel()), device="meta")
    return local(p).detach()


def wrapped(t: Tensor, p: Tensor) -> Tensor:
    """A value of the state of ``p`` as it is kept: of a DTensor's a DTensor, unless it is in groups."""
    shards = None if t.dtype in reference.GROUPED else Shards.of(p)
    return t if shards is None else shards.wrap(t, p)


def _order(packed: Tensor, p: Tensor) -> reference.Order | None:
    """In which order the elements of a moment of ``p`` in 8 bits are counted: that which ``p`` had when it was made.

    (Of one that somebody has copied or moved, nobody knows: that which ``p`` has now.)
    """
    return packed.order if hasattr(packed, "order") else reference.order_of(local(p))


def stands_alone(packed: Tensor, p: Tensor) -> bool:
    """Whether a moment of ``p`` in 8 bits says all: neither how ``p`` lies nor which part of it this is, is asked."""
    return _order(packed, p) is None and not is_sharded(p)


def fill_grouped(packed: Tensor, value: Tensor, p: Tensor) -> None:
    """Writes what is to be a moment of ``p`` in 8 bits, rounded to nearest, in the order in which ``p`` lies."""
    _count_as_it_lies(packed, p)
    packed.copy_(reference.pack(value, packed.dtype, order=_order(packed, p)))


def _count_as_it_lies(packed: Tensor, p: Tensor) -> None:
    packed.order = reference.order_of(local(p))  # type: ignore[attr-defined]


def is_grouped(name: str, value: Any) -> bool:
    """Whether a value of a parameter's state is a moment in 8 bits."""
    return name in _MOMENT_NAMES and isinstance(value, Tensor) and value.dtype in reference.GROUPED


def value_of(name: str, value: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a master or moment of ``p`` in full, whatever form it is kept in."""
    if is_grouped(name, value):
        return reference.unpack(value, local(p).shape, _order(value, p))
    return reference.master_value(local(value), local(p)) if name == "master" else local(value)


def _converted(name: str, value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A master or moment that was kept in another form."""
    new, shard = value_of(name, value, p), local(p)
    (made,) = memory.zeros_like_each([_model(p, name, dtype)], dtype, shard.device)
    if dtype in reference.GROUPED:
        fill_grouped(made, new, p)
    else:
        made.copy_(reference.master_of(new, p.dtype, dtype) if name == "master" else new)
    return wrapped(made, p)


def _count_dtype(p: Tensor) -> torch.dtype:
    """torch's choice where no kernel reads it; the kernels', and torch's fused ones, are fp32."""
    wide = p.dtype not in ops.KERNEL_DTYPES and torch.get_default_dtype() == torch.float64
    return torch.float64 if wide else torch.float32


def _zeros_like(t: Tensor, dtype: torch.dtype, device: torch.device, beside: Callable[[], list[Tensor]]) -> Tensor:
    if is_wrapper(t):
        return torch.zeros_like(t, dtype=dtype)
    return memory.zeros_like_each([t], dtype, device, lambda _: beside())[0]
