"""State dictionaries, ours and torch's: out, and in again without loss."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from deepfast import reference
from deepfast.optim import asked_whole
from deepfast.optim.hyper import check_flags
from deepfast.optim.shards import Shards, copy_into, local
from deepfast.optim.state import Stateful, fill_grouped, is_grouped, stands_alone, value_of, wrapped

_NO_STATE = "load_state_dict() takes the state_dict() of an optimizer"


class Loadable(Stateful):
    """The part of :class:`deepfast.optim.Optimizer` that is saved and loaded."""

    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """torch's keys, and ``master``; a copy of the dictionaries, the tensors themselves.

        Args:
            compact: masters and moments in the form that they are kept in, too. A split master is worth something only
                beside its parameter: load that first. Else what is split or in 8 bits is a new fp32 tensor. (In 8 bits,
                that of a DTensor, or of a parameter that does not lie row after row, always is.)
        """
        if asked_whole.asks():
            self.init_state()
        params = dict(enumerate(self._params()))

        def unwatch(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            state = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
            for key, p in params.items():
                if isinstance(values := state.get(key), dict):
                    values.update(
                        (name, self.unpacked(p, name, value))
                        for name, value in values.items()
                        if not compact or (is_grouped(name, value) and not stands_alone(value, p))
                    )
            state_dict["state"] = state

        first = self.register_state_dict_post_hook(unwatch, prepend=True)  # the user's may make anything of it
        try:
            return super().state_dict()
        finally:
            first.remove()

    @torch.no_grad()
    def unpacked(self, p: Tensor, name: str, value: Any) -> Any:
        """A value of the state of ``p`` in the form in which it travels: what is split or in 8 bits as fp32."""
        split = name == "master" and isinstance(value, Tensor) and value.dtype != torch.float32
        return wrapped(value_of(name, value, p), p) if split or is_grouped(name, value) else value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads our state_dict or torch's, in place and without loss.

        Moments stay fp32 whatever the parameter's dtype (torch would cast them to it), and where a master is missing
        the parameter is taken. Raises ValueError where groups or states do not fit.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"deepfast: {_NO_STATE}, not {type(state_dict).__name__}")
        own, groups = self.state, self.param_groups
        given: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            given.update(self._checked(state_dict))  # as the user's own hooks left it
            return {**given, "state": {}}  # torch would copy each tensor, and cast it to its parameter's dtype

        def restore(_: torch.optim.Optimizer) -> None:
            for kept, loaded in zip(groups, self.param_groups, strict=True):
                kept.update(loaded)  # the same dicts as before: others may hold them
            self.state, self.param_groups = own, groups
            self._take_state(given)

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)  # the user's hooks see our state
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """``state_dict`` with its groups as they shall be here; raises before anything has changed."""
        if not {"state", "param_groups"} <= state_dict.keys():
            found = ", ".join(map(repr, list(state_dict)[:3])) or "nothing"
            raise ValueError(f"deepfast: {_NO_STATE}, with 'state' and 'param_groups'; this one has {found}")
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            return state_dict  # torch's own error is clear
        groups = []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            ours = {k: v for k, v in own.items() if k != "params"}
            groups.append({**ours, **saved, **{k: ours[k] for k in self._not_loaded if k in ours}})
            check_flags(groups[-1])
            for name, p in zip(saved["params"], own["params"], strict=True):
                self._check_state(state_dict["state"].get(name), p, groups[-1])
        return {**state_dict, "param_groups": groups}

    def _check_state(self, values: dict[str, Any] | None, p: Tensor, group: dict[str, Any]) -> None:
        moments = self._moments(group)  # refuses some, begun or not
        for name in moments if _begun(values) else ():
            value = None if values is None else values.get(name)
            if value is None and not name.startswith("max_"):  # that one may begin at zero: amsgrad turned on later
                raise ValueError(
                    f"deepfast: the loaded state has no {name!r} (it has {', '.join(values or ())}): "
                    f"it is not that of a {type(self).__name__}"
                )
            shape = p.shape
            if is_grouped(name, value):
                shape = torch.Size([reference.packed_size(p.numel())])
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"deepfast: the loaded {name!r} has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}"
                )
        if values is not None and _begun(values) and self._counts_steps(group):
            self._steps_of(values, group)
        for name, shape in (("master", p.shape), ("step", torch.Size())):
            value = (values or {}).get(name)
            if isinstance(value, Tensor) and value.shape != shape and (value.numel() != 1 or name == "master"):
                raise ValueError(f"deepfast: the loaded {name!r} has shape {tuple(value.shape)}, not {tuple(shape)}")

    @torch.no_grad()
    def _take_state(self, given: dict[str, Any]) -> None:
        names = list(itertools.chain.from_iterable(group["params"] for group in given["param_groups"]))
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        saved = {p: given["state"].get(name) for name, (p, _) in zip(names, params, strict=True)}
        saved = {p: dict(values) for p, values in saved.items() if _begun(values)}
        for p, group in params:
            if p in saved and self._counts_steps(group):
                saved[p]["step"] = torch.as_tensor(self._steps_of(saved[p], group)).reshape(())
        self._given = {}
        for p, _ in params:
            if p not in saved:
                self.state.pop(p, None)
        self._init_state((p, group) for p, group in params if p in saved)
        others = given["state"].keys() - set(names)  # what somebody keeps beside the parameters' states
        self.state.update((key, given["state"][key]) for key in others)
        for p, values in saved.items():
            self._take_master(p, values.pop("master", None))
            for key, value in values.items():
                kept = self.state[p].get(key)
                if not isinstance(kept, Tensor):
                    self.state[p][key] = value.clone() if isinstance(value, Tensor) else value
                elif is_grouped(key, kept) or is_grouped(key, value):
                    _take_moment(p, key, kept, value)
                else:
                    copy_into(kept, value)

    def _take_master(self, p: Tensor, given: Tensor | None) -> None:
        kept = self.state[p].get("master")
        if kept is None:
            return
        if given is not None and given.dtype == kept.dtype:
            copy_into(kept, given)
            return
        # One that is missing, or that a torch optimizer has carried along and cast to 16 bits, knows nothing of that
        # one's steps. The parameter does.
        weight, shards = local(p), Shards.of(p)
        wide = weight.float() if weight.dtype != torch.float32 else weight.clone()
        if given is not None and given.dtype in (torch.float32, torch.int16):
            there = torch.empty_like(wide, dtype=given.dtype)
            copy_into(there if shards is None else shards.wrap(there, p), given)
            wide = reference.master_value(there, weight)
        master = local(kept)
        master.copy_(reference.master_of(wide, p.dtype, master.dtype))


def _take_moment(p: Tensor, name: str, kept: Tensor, given: Tensor) -> None:
    """Fills ``kept`` where it, or what is given, is in 8 bits. That is then all of it (see ``stands_alone``)."""
    if is_grouped(name, given):
        given = reference.unpack(given, p.shape)
    whole = wrapped(torch.empty_like(local(p), dtype=torch.float32), p)
    copy_into(whole, given)
    if is_grouped(name, kept):
        fill_grouped(kept, local(whole), p)
    else:
        local(kept).copy_(local(whole))


def _begun(values: dict[str, Any] | None) -> bool:
    """Whether a loaded state holds anything. (torch's SGD has once written momentum_buffer: None.)"""
    return values is not None and any(value is not None for value in values.values())
