"""What all optimizers share: state, its state_dict, and the step from gradients to a call of the kernels."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from deepfast import memory, ops, reference
from deepfast.optim import lost
from deepfast.optim.launch import Launch
from deepfast.optim.options import ALIVE, NAMES, Option, asked_for
from deepfast.optim.shards import Shards, copy_into, is_flat_shard, is_sharded, local, refuse_flat_shards
from deepfast.optim.shared import Shared, Verdict, check_seen
from deepfast.optim.state import States, look, unwatched

Value = float | Tensor
HALF = frozenset((torch.float16, torch.bfloat16))


class _Identity(TorchFunctionMode):
    """Within, a tensor equals itself alone: lists of thousands are compared by identity at the speed of C."""

    def __torch_function__(self, *_: Any, **__: Any) -> bool:
        return False


class Optimizer(torch.optim.Optimizer):
    """Base of all optimizers; not used by itself.

    Keyword arguments beyond torch's:

    Args:
        master: where a 16-bit parameter's fp32 value is kept. "auto" and "fp32": as an fp32 tensor in the state;
            "none": nowhere, the parameter itself is updated and rounded to nearest even, as in torch; a warning says
            once if most updates are lost to that.
        max_grad_norm: clip the gradients to this global L2 norm (over all groups) inside the step. FSDP1's flat shards
            do not show it: an error.
        reset_grad: zero the gradients in the step's own pass, skipped steps included.
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch, slow); "auto" follows
            ``$DEEPFAST_BACKEND``.
        state_dtype, rounding: only "fp32" and "nearest" so far.

    Attributes:
        grad_norm: after a step the global gradient norm, unscaled, before clipping, a 0-d fp32 tensor on the
            parameters' device; None where neither clipping nor a :class:`deepfast.LossScaler` asked for it.
        grad_scale: what the gradients have been multiplied by (set by a gradient scaler around the step), or None.
        found_inf: a tensor that is > 0 where the step is to be skipped (set likewise), or None.
    """

    # In common with a wrapper of the optimizer (shared.py): what a scaler or the engine hands over, what came of it.
    grad_norm: Any = Shared(None)
    grad_scale: Any = Shared()
    found_inf: Any = Verdict()
    _check_finite: Any = Shared(False)  # see _scaled
    _statistics: Any = Shared(None)  # of this step's gradients, all of them, where the engine knows them already
    _found_inf: Any = Shared(None)  # what the last step decided
    _leaves_gradients: Any = Shared(False)  # grad_scale or not: they are not written
    _has_stepped: Any = Shared(False)  # a step has seen what was handed over
    _measure_norm = False  # set by deepfast.Engine: fill grad_norm even where nothing clips

    master, max_grad_norm, reset_grad, backend = Option(), Option(), Option(), Option()

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        defaults |= asked_for(params, options)
        self._shared: dict[str, Any] = {}
        self._launches: list[Launch] = []
        self._planned: tuple[Any, list[Tensor], list[Tensor]] | None = None  # what the launches were made from
        self._check(defaults)
        super().__init__(params, defaults)
        self.state = States()
        ALIVE.add(self)
        if self.master == "none":
            lost.watch(self, "without master='none' they add up in an fp32 master")

    # What a subclass says of itself.

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a hyperparameter out of range."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any]) -> str:
        """The kernels' name of the rule that updates this group."""
        raise NotImplementedError

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """torch's names of the tensors that the rule keeps, in the kernels' order."""
        raise NotImplementedError

    # What of a group is not a checkpoint's to say: how the step is done, and (of some) which rule the class is.
    _not_loaded: tuple[str, ...] = ("foreach", "fused")
    # The count of a state that has begun and has none.
    _uncounted: float | None = None

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        """Whether the rule needs to know how many steps a parameter has seen."""
        return True

    def _initial(self, group: dict[str, Any]) -> float:
        """What the moments begin at."""
        return 0.0

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        """The values that the rule's ``prepare`` takes."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps only defaults, state and groups of an optimizer that is copied or pickled."""
        own = {"_measure_norm": self._measure_norm, "_launches": [], "_planned": None}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shared = {}
        self.state = States(self.state)
        ALIVE.add(self)

    # State.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in NAMES:
            if name in param_group:
                raise ValueError(f"deepfast: {name} is an option of the optimizer, not of a parameter group")
        super().add_param_group(param_group)
        for name in NAMES:
            param_group.pop(name, None)  # torch has put all of ``defaults`` there
        try:
            self._check(self.param_groups[-1])
            for shards in filter(None, map(Shards.of, self.param_groups[-1]["params"])):
                if any(placement.is_partial() for placement in shards.placements):
                    raise ValueError("deepfast: a parameter is a DTensor of partial sums: redistribute() it first")
            _check_flags(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

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
            if not self._keeps_master(p):
                state.pop("master", None)  # a model that was cast to fp32 is its own master
            for name in (*self._moments(group), "master", "step"):
                if (mended := _mended(name, state.get(name), p)) is not state.get(name):
                    state[name] = mended
            for name, dtype, initial in self._absent(p, group):
                missing[p.device, name, dtype, initial, _is_special(p) and name != "step"].append(p)
        if any(_capturing(device) for device, *_ in missing):
            raise RuntimeError(
                "deepfast: state that is made while a graph is captured would begin anew at each replay: step once "
                "before the capture"
            )
        for (device, name, dtype, initial, alone), params in missing.items():
            like = [p.new_empty((), device="meta") if name == "step" else local(p).detach() for p in params]
            beside = None if name == "step" else functools.partial(self._streams, params)
            if alone:
                views = [_zeros_like(t, dtype, self._streams(params, nth)) for nth, t in enumerate(like)]
            else:
                views = memory.zeros_like_each(like, dtype, device, beside)
            for p, model, t in zip(params, like, views, strict=True):
                if name == "master":
                    t.copy_(model)
                elif initial:
                    t.fill_(complex(initial, initial) if dtype.is_complex else initial)
                shards = Shards.of(p) if alone else None
                self.state[p][name] = t if shards is None else shards.wrap(t, p)

    def _streams(self, params: list[Tensor], nth: int) -> list[Tensor]:
        """What a step of the nth of ``params`` walks side by side, so far as it is there."""
        p = params[nth]
        streams = (p, p.grad, *(t for name, t in self.state.get(p, {}).items() if name != "step"))
        shards = [local(t) for t in streams if isinstance(t, Tensor)]
        return [t for t in shards if t.device.type == "cpu" and t.layout is torch.strided and not _is_wrapper(t)]

    def _absent(self, p: Tensor, group: dict[str, Any]) -> Iterator[tuple[str, torch.dtype, float]]:
        """What the state of ``p`` lacks: name, dtype, and the value it begins with."""
        state = self.state.get(p, {})
        if self._keeps_master(p) and state.get("master") is None:
            yield "master", torch.float32, 0.0
        moments = [name for name in self._moments(group) if state.get(name) is None]
        for name in moments:
            yield name, _moment_dtype(p), self._initial(group)
        # Where no moment is left, the parameter begins anew.
        if self._counts_steps(group):
            if len(moments) == len(self._moments(group)):
                yield "step", _count_dtype(p), 0.0
            elif state.get("step") is None:
                yield "step", _count_dtype(p), float(self._steps_of(state, group))

    def _has_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        state = self.state.get(p, {})
        whole = next(self._absent(p, group), None) is None and ("master" in state) == self._keeps_master(p)
        names = (*self._moments(group), "master", "step")
        return whole and all(_mended(name, state.get(name), p) is state.get(name) for name in names)

    def _keeps_master(self, p: Tensor) -> bool:
        return p.dtype in HALF and self.master != "none"

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Takes over parameters that were written from outside.

        The next step does so by itself, of those that were written in place (``model.load_state_dict``, ``p.clamp_()``)
        or given other memory; what was written past autograd's eyes (``p.data``) it does not see.
        """
        for p in self._params():
            state = self.state.get(p, {})
            if "master" in state:
                master, weight = local(state["master"]), local(p)
                reference.refresh(master, weight)

    def _params(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """torch's keys, and ``master``; a copy of the dictionaries, the tensors themselves."""

        def unwatch(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            state_dict["state"] = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}

        first = self.register_state_dict_post_hook(unwatch, prepend=True)  # the user's may make anything of it
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads our state_dict or torch's, in place and without loss.

        Moments stay fp32 whatever the parameter's dtype (torch would cast them to it), and where a master is missing
        the parameter is taken. Raises ValueError where groups or states do not fit.
        """
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
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            return state_dict  # torch's own error is clear
        groups = []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            ours = {k: v for k, v in own.items() if k != "params"}
            groups.append({**ours, **saved, **{k: ours[k] for k in self._not_loaded if k in ours}})
            _check_flags(groups[-1])
            for name, p in zip(saved["params"], own["params"], strict=True):
                self._check_state(state_dict["state"].get(name), p, groups[-1])
        return {**state_dict, "param_groups": groups}

    def _check_state(self, values: dict[str, Any] | None, p: Tensor, group: dict[str, Any]) -> None:
        for name in self._moments(group) if _begun(values) else ():
            value = None if values is None else values.get(name)
            if value is None and not name.startswith("max_"):  # that one may begin at zero: amsgrad turned on later
                raise ValueError(
                    f"deepfast: the loaded state has no {name!r} (it has {', '.join(values or ())}): "
                    f"it is not that of a {type(self).__name__}"
                )
            if value is not None and value.shape != p.shape:
                raise ValueError(
                    f"deepfast: the loaded {name!r} has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}"
                )
        if values is not None and _begun(values) and self._counts_steps(group):
            self._steps_of(values, group)
        for name, shape in (("master", p.shape), ("step", torch.Size())):
            value = (values or {}).get(name)
            if isinstance(value, Tensor) and value.shape != shape and (value.numel() != 1 or name == "master"):
                raise ValueError(f"deepfast: the loaded {name!r} has shape {tuple(value.shape)}, not {tuple(shape)}")

    def _steps_of(self, values: dict[str, Any], group: dict[str, Any]) -> Any:
        """How many steps the moments in ``values`` have seen. (apex, and its like, count in the group.)"""
        for count in (values.get("step"), group.get("step"), self._uncounted):
            if count is not None:
                return count
        raise ValueError(
            f"deepfast: a state of {type(self).__name__} has {', '.join(values)} but no 'step', nor has its group: put "
            "there how many steps it has seen"
        )

    @torch.no_grad()
    def _take_state(self, given: dict[str, Any]) -> None:
        names = list(itertools.chain.from_iterable(group["params"] for group in given["param_groups"]))
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        saved = {p: given["state"].get(name) for name, (p, _) in zip(names, params, strict=True)}
        saved = {p: dict(values) for p, values in saved.items() if _begun(values)}
        for p, group in params:
            if p in saved and self._counts_steps(group):
                saved[p]["step"] = torch.as_tensor(self._steps_of(saved[p], group)).reshape(())
        for p, _ in params:
            if p not in saved:
                self.state.pop(p, None)
        self._init_state((p, group) for p, group in params if p in saved)
        others = given["state"].keys() - set(names)  # what somebody keeps beside the parameters' states
        self.state.update((key, given["state"][key]) for key in others)
        for p, values in saved.items():
            # A master that is missing, or that a torch optimizer has carried along and cast to 16 bits: it knows
            # nothing of that one's steps. The parameter does.
            master = values.pop("master", None)
            if "master" in self.state[p]:
                copy_into(self.state[p]["master"], p if master is None or master.dtype != torch.float32 else master)
            for key, value in values.items():
                kept = self.state[p].get(key)
                if isinstance(kept, Tensor):
                    copy_into(kept, value)
                else:
                    self.state[p][key] = value.clone() if isinstance(value, Tensor) else value

    # The step.

    @contextlib.contextmanager
    def _scaled(
        self, grad_scale: Tensor | None, found_inf: Tensor | None = None, check_finite: bool = False
    ) -> Iterator[None]:
        """A step inside the block unscales its gradients, and is skipped where ``found_inf`` > 0.

        check_finite: it also looks for non-finite gradients itself, and is skipped where it finds one. The first two
        are the attributes by which torch's GradScaler says the same.

        Raises:
            RuntimeError: after a block without a step.
        """
        shared = self._shared
        given = {"grad_scale": grad_scale, "found_inf": found_inf, "_check_finite": check_finite}
        given["_leaves_gradients"] = True
        outer = {name: shared[name] for name in given if name in shared}
        shared.update(given, _has_stepped=False)
        try:
            yield
        finally:
            for name in given:
                shared.pop(name, None)
            shared.update(outer)
        check_seen(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the step unscales and skips by itself; else torch's GradScaler does it before. Frameworks ask, too.

        As with torch's own where fused=True was asked for, and for fp16 gradients, which GradScaler refuses. Not for
        FSDP1's shards, whose ranks have to agree. Nor if a stranger's ``__getattr__`` asks for it: what a scaler
        sets on that object does not come here.
        """
        if sys._getframe(1).f_code.co_name in ("__getattr__", "__getattribute__"):
            return False
        params = list(self._params())
        if any(map(is_flat_shard, params)):
            return False
        dtypes = {t.dtype for p in params for t in (p, p.grad) if t is not None}
        return torch.float16 in dtypes or any(group.get("fused") for group in self.param_groups)

    # Not torch.compiler.disable: that imports the compiler with this module, this one where it is first called.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient. Returns what ``closure`` returned, if one was given.

        Raises:
            RuntimeError: for sparse gradients, and for a backend that was asked for and is not to be had.
        """
        self._has_stepped = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches = self._gather()
        for launch in launches:
            if _capturing(launch.device):
                self._check_capture(launch.device)
        self.grad_norm = self._found_inf = None
        if not launches:
            return loss
        records = self._decide(launches)
        for launch in launches:
            launch.step(*self._hyper_table(launch.device), records[launch.device])
        for launch in launches if len(launches) > 1 else ():
            launch.settle()  # the others may have written to views of the same memory
        if self._planned is None:
            self._forget_plan()
        return loss

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        # Whoever has put other parameters into the groups wants the memory of the old ones back.
        if self._planned is not None:
            with _Identity():
                same = self._planned[1] == list(self._params())
            if not same:
                self._forget_plan()

    def _afterwards(self) -> int:
        """What becomes of the gradients. torch's fused steps leave them unscaled where ``grad_scale`` is set."""
        if self.defaults.get("reset_grad"):  # (Looked up where they lie: this is done at each step.)
            return reference.RESET
        scaled = self._shared.get("grad_scale") is not None and not self._shared.get("_leaves_gradients")
        return reference.WRITTEN if scaled else reference.KEPT

    def _check_capture(self, device: torch.device) -> None:
        """A graph replays the numbers of its capture; those that change must be tensors, and those are read anew."""
        for group in self.param_groups:
            lr, *others = self._hyper(group)
            if not isinstance(lr, Tensor) or not _is_read_on(device, lr):
                value = "..." if isinstance(lr, Tensor) else lr
                raise RuntimeError(
                    f"deepfast: a graph would keep the learning rate of its capture for ever: give it as a float32 or "
                    f"float64 tensor on {device} (lr=torch.tensor({value}, device='cuda')) and change it in place"
                )
            if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in others):
                raise RuntimeError("deepfast: only the learning rate is read on the device: give the others as floats")

    def _gather(self) -> list[Launch]:
        """The launches of this step; what does not change from step to step is looked at once."""
        params = list(self._params())
        if self._planned is not None:
            seen, known, loose = self._planned
            with _Identity():
                same = known == params and seen == self._seen(loose)
            if not (same and self._found_gradients()):
                self._forget_plan()
        if self._planned is None:
            self._plan()
            if not self._found_gradients():
                raise RuntimeError("deepfast: the parameters changed while the step looked at them")
            if not any(launch.passing for launch in self._launches):
                loose = unwatched(self.state, params)
                self._planned = self._seen(loose), params, loose
        # A rank without gradients of its own still takes part in the sums over the ranks.
        return [launch for launch in self._launches if launch.gradients or launch.shards]

    def _seen(self, loose: list[Tensor]) -> Any:
        """All that a plan depends on, but for the parameters. loose: those with state that nobody watches."""
        groups = [(self._rule(group), self._moments(group), len(group["params"])) for group in self.param_groups]
        options = self.defaults.get("master"), self.defaults.get("backend")
        return groups, options, id(self.state), look(self.state, loose)

    def _forget_plan(self) -> None:
        self._launches, self._planned = [], None

    def _found_gradients(self) -> bool:
        """False: some launch's plan is stale. All are asked: another rank may be waiting for this one."""
        after = self._afterwards()
        found = [launch.gather(after) for launch in self._launches]
        if all(found) and after != reference.KEPT and len(self._launches) > 1:
            reference.check_distinct([r for launch in self._launches for r in launch.gradient_memory()])
        return all(found)

    def _plan(self) -> None:
        """Deals the parameters out to launches, and makes their state where it is missing."""
        launches: dict[Any, Launch] = {}
        fresh, seen, layers = [], set(), memory.layers(map(local, self._params()))
        for index, group in enumerate(self.param_groups):
            rule, backend = self._rule(group), self.backend
            for p in group["params"]:
                if id(p) in seen:
                    raise RuntimeError(f"deepfast: a parameter of shape {tuple(p.shape)} is in the groups twice")
                seen.add(id(p))
                grad = p.grad
                layer = layers.get(id(local(p)))
                launch = self._launch_of(launches, p, grad, rule, backend, Shards.of(p), group, layer)
                if not self._has_state(p, group):
                    if grad is None:
                        launch.waiting.append(p)
                        continue
                    fresh.append((p, group))
                launch.params.append(p)
                launch.groups.append(index)
        self._init_state(fresh)
        self._launches = list(launches.values())
        for launch in self._launches:
            launch.build(self.state)

    def _launch_of(
        self,
        launches: dict[Any, Launch],
        p: Tensor,
        grad: Tensor | None,
        rule: str,
        backend_name: str,
        shards: Shards | None,
        group: dict[str, Any],
        layer: int | None,
    ) -> Launch:
        dtype, usual = p.dtype, backend_name
        if grad is not None:
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients: the parameter of shape "
                    f"{tuple(p.shape)} has one ({grad.layout}); build its layer with sparse=False"
                )
            dtype = grad.dtype
            if grad.is_neg() or _is_wrapper(local(grad)):  # a lazy view, whose memory holds the opposite
                backend_name = "reference"
            if p.is_meta and group.get("fused"):
                raise RuntimeError(
                    "`fused=True` requires all the params to be floating point Tensors of supported devices, "
                    f"but a parameter of shape {tuple(p.shape)} lies on {p.device}: give it memory (to_empty) first"
                )
        if _is_wrapper(local(p)):
            backend_name = usual = "reference"
        backend = ops.select(backend_name, p.device, p.dtype, dtype)
        key = (id(backend), p.device, rule, shards, layer)  # what lies in one place is stepped one after the other
        if key not in launches:
            launches[key] = Launch(backend, p.device, rule, self._moments(group), self._counts_steps(group), shards)
            launches[key].overlaps = layer is not None
        launches[key].passing |= backend is reference and ops.select(usual, p.device, p.dtype) is not reference
        return launches[key]

    def _decide(self, launches: Sequence[Launch]) -> dict[torch.device, Tensor]:
        """Whether to skip, and what to multiply gradients by: a record for each device."""
        handed, max_norm = self._shared, self.defaults.get("max_grad_norm")
        grad_scale, found_inf = handed.get("grad_scale"), handed.get("found_inf")
        check = handed.get("_check_finite", False)
        home = launches[0].device
        statistics = None
        asked = max_norm is not None or check or self._measure_norm
        if not asked and grad_scale is None and found_inf is None:
            return {launch.device: _as_they_are(launch.device) for launch in launches}
        if asked and any(launch.flat for launch in launches):
            refuse_flat_shards("overflow" if check else "norm")
        record = torch.empty(3, dtype=torch.float32, device=home)
        question = _on(grad_scale, home), _on(found_inf, home), max_norm or 0.0, check
        if asked and self._statistics is None and len(launches) == 1 and launches[0].shards is None:
            launches[0].decide(record, *question)
        else:
            if asked and self._statistics is not None:
                statistics = self._statistics.to(home)
            elif asked:
                parts = [launch.statistics().to(home) for launch in launches]
                statistics = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            backend = launches[0].backend if len(launches) == 1 else reference
            backend.decide_(record, statistics, *question)
        if asked:
            self.grad_norm = record[2]
        self._found_inf = record[1]
        return {launch.device: record.to(launch.device) for launch in launches}

    def _hyper_table(self, device: torch.device) -> tuple[Tensor, list[Tensor | None]]:
        """fp64 [groups, 1 + the rule's values]: the gradient's sign, then what ``_hyper`` says (lr first).

        And the learning rates that are tensors on ``device``: they are read there, in the step, and stand for the
        table's. (No list if there are none.)
        """
        signs = [-1.0 if group["maximize"] else 1.0 for group in self.param_groups]
        values = [self._hyper(group) for group in self.param_groups]
        lrs = [lr if isinstance(lr, Tensor) and _is_read_on(device, lr) else None for lr, *_ in values]
        rows = [
            [sign, 0.0 if lr is not None else float(row[0]), *map(float, row[1:])]
            for sign, row, lr in zip(signs, values, lrs, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64, device="cpu"), lrs if any(lr is not None for lr in lrs) else []


_RECORDS: dict[tuple[torch.device, int], Tensor] = {}


def _as_they_are(device: torch.device) -> Tensor:
    """The record of a step that neither scales nor clips nor skips."""
    # Another stream would not wait until it is filled.
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    real = _get_current_dispatch_mode() is None  # else the record may be fake, or fake parameters take no real one
    record = _RECORDS.get(key) if real else None
    if record is None:
        record = torch.zeros(3, dtype=torch.float32, device=device)
        record[:1].fill_(1.0)
        if real and not _capturing(device):  # else it is filled when the graph runs
            _RECORDS[key] = record
    return record


def require(condition: bool | Tensor, message: str) -> None:
    """For hyperparameters: raises ValueError with torch's words."""
    if not condition:
        raise ValueError(message)


def check_lr(group: dict[str, Any]) -> None:
    lr = group["lr"]
    require(not isinstance(lr, Tensor) or lr.numel() == 1, "Tensor lr must be 1-element")
    require(0.0 <= lr, f"Invalid learning rate: {lr}")


def check_betas(group: dict[str, Any]) -> None:
    require(len(group["betas"]) == 2, f"Invalid betas: {group['betas']}, there must be two")
    for i, beta in enumerate(group["betas"]):
        require(not isinstance(beta, Tensor) or beta.numel() == 1, f"Tensor betas[{i}] must be 1-element")
        require(0.0 <= beta < 1.0, f"Invalid beta parameter at index {i}: {beta}")


def _check_flags(group: dict[str, Any]) -> None:
    """What torch's optimizers take beside hyperparameters: how a step is done."""
    if group.get("differentiable"):
        raise ValueError("deepfast: differentiable=True is not supported: the step happens in place")
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _begun(values: dict[str, Any] | None) -> bool:
    """Whether a loaded state holds anything. (torch's SGD has once written momentum_buffer: None.)"""
    return values is not None and any(value is not None for value in values.values())


def _is_wrapper(t: Tensor) -> bool:
    """Whether ``t`` is of a class that does its own arithmetic (a quantized tensor, say) and has no memory to read."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _is_special(p: Tensor) -> bool:
    """Whether state like ``p`` is allocated by itself (a DTensor around a part of something cannot be deep-copied)."""
    return is_sharded(p) or _is_wrapper(p)


def _capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _is_read_on(device: torch.device, lr: Tensor) -> bool:
    """Whether the kernels on ``device`` read ``lr`` for themselves, without the host's waiting for it."""
    return lr.device == device and lr.dtype in (torch.float32, torch.float64)


def _is_count(step: Any, p: Tensor) -> bool:
    known = (torch.float32,) if p.dtype in ops.KERNEL_DTYPES else (torch.float32, torch.float64)
    return isinstance(step, Tensor) and step.dtype in known and step.numel() == 1 and step.device == p.device


def _mended(name: str, value: Any, p: Tensor) -> Any:
    """A value of the state of ``p``, itself if ``p`` can use it; None if there is none."""
    if value is None or (isinstance(value, Tensor) and value.is_meta and not p.is_meta):  # ``p`` has got memory since
        return None
    if name == "step":
        return value if _is_count(value, p) else torch.tensor(float(value), dtype=_count_dtype(p), device=p.device)
    return value if _is_special(p) or _capturing(p.device) else memory.in_order_of(value, p)


def _count_dtype(p: Tensor) -> torch.dtype:
    """torch's choice where no kernel reads it; the kernels', and torch's fused ones, are fp32."""
    wide = p.dtype not in ops.KERNEL_DTYPES and torch.get_default_dtype() == torch.float64
    return torch.float64 if wide else torch.float32


def _zeros_like(t: Tensor, dtype: torch.dtype, beside: list[Tensor]) -> Tensor:
    if _is_wrapper(t):
        return torch.zeros_like(t, dtype=dtype)
    return memory.zeros_like_each([t], dtype, t.device, lambda _: beside)[0]


def _moment_dtype(p: Tensor) -> torch.dtype:
    if p.is_complex():
        return p.dtype
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _on(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if is_sharded(value):
        value = value.full_tensor()  # type: ignore[union-attr]
    return torch.as_tensor(value, dtype=torch.float32, device=device)
