"""What all optimizers share: state, its state_dict, and the step from gradients to a call of the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepfast import memory, ops, reference

Value = float | Tensor
HALF = frozenset((torch.float16, torch.bfloat16))
_OPTIONS = ("master", "max_grad_norm", "reset_grad", "backend", "_measure_norm")


@dataclasses.dataclass
class _Launch:
    """The parameters that one call of a backend takes: one device, one rule."""

    backend: Any
    rule: str
    moments: tuple[str, ...]
    params: list[Tensor] = dataclasses.field(default_factory=list)
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    lazy: list[Tensor] = dataclasses.field(default_factory=list)  # gradients of which a copy is among `grads`


class Optimizer(torch.optim.Optimizer):
    """Base of all optimizers; not used by itself.

    Keyword arguments beyond torch's:

    Args:
        master: where a 16-bit parameter's fp32 value is kept. "auto" and "fp32": as an fp32 tensor in the state;
            "none": nowhere, the parameter itself is updated and rounded to nearest even, as in torch.
        max_grad_norm: clip the gradients to this global L2 norm (over all groups) inside the step.
        reset_grad: zero the gradients in the step's own pass, skipped steps included.
        backend: "auto", "cpu" or "reference"; "auto" follows ``$DEEPFAST_BACKEND``.
        state_dtype, rounding: only "fp32" and "nearest" so far.

    Attributes:
        grad_norm: after a step the global gradient norm, unscaled, before clipping, a 0-d fp32 tensor on the
            parameters' device; None where neither clipping nor a :class:`deepfast.LossScaler` asked for it.
        grad_scale: what the gradients have been multiplied by (set by a gradient scaler around the step), or None.
        found_inf: a tensor that is > 0 where the step is to be skipped (set likewise), or None.
    """

    _step_supports_amp_scaling = True

    grad_norm: Tensor | None = None
    grad_scale: Tensor | None  # there only while a scaler has set them
    found_inf: Tensor | None
    _measure_norm = False  # set by deepfast.Engine: fill grad_norm even where nothing clips
    _check_finite = False  # see _scaled
    _found_inf: Tensor | None = None  # what the last step decided

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        master: str = "auto",
        state_dtype: str = "fp32",
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        reset_grad: bool = False,
        backend: str = "auto",
    ) -> None:
        for name, value, known, later in (
            ("master", master, ("auto", "fp32", "none"), ("split", "split8")),
            ("state_dtype", state_dtype, ("fp32",), ("bf16", "param", "int8")),
            ("rounding", rounding, ("nearest",), ("stochastic",)),
        ):
            if value not in known:
                verdict = "is not built yet" if value in later else "is not known"
                raise ValueError(f"deepfast: {name}={value!r} {verdict}: choose one of {', '.join(known)}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"deepfast: max_grad_norm must be positive, got {max_grad_norm}")
        self.master = master
        self.max_grad_norm = max_grad_norm
        self.reset_grad = reset_grad
        self.backend = ops.forced(backend)
        self._versions: dict[Tensor, int] = {}  # of 16-bit parameters, after the last step
        super().__init__(params, defaults)

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

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        """The values that the rule's ``prepare`` takes."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps only defaults, state and groups of an optimizer that is copied or pickled; we have options."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OPTIONS}, "_versions": {}}

    # State.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in _OPTIONS:
            if name in param_group:
                raise ValueError(f"deepfast: {name} is an option of the optimizer, not of a parameter group")
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            if any(hasattr(p, "to_local") for p in self.param_groups[-1]["params"]):
                raise ValueError("deepfast: DTensor parameters are not built yet: use torch's optimizer for this model")
            _check_not_differentiable(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def init_state(self) -> None:
        """Allocates the state of every parameter that has none yet, as its first step would, without stepping."""
        self._init_state((p, group) for group in self.param_groups for p in group["params"])

    def _init_state(self, wanted: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """What the given parameters' state lacks, one allocation per device, dtype and kind."""
        shares: dict[tuple[torch.device, torch.dtype, str], list[Tensor]] = defaultdict(list)
        for p, group in wanted:
            state = self.state[p]
            if not self._keeps_master(p):
                state.pop("master", None)  # a model that was cast to fp32 is its own master
            elif "master" not in state:
                shares[p.device, torch.float32, "master"].append(p)
            for name in self._moments(group):
                if name not in state:
                    shares[p.device, _moment_dtype(p), name].append(p)
            if "step" not in state:
                shares[p.device, torch.float32, "step"].append(p)
        for (device, dtype, name), params in shares.items():
            like = [p.new_empty((), device="meta") for p in params] if name == "step" else params
            _, views = memory.zeros_like_each(like, dtype, device)
            for p, t in zip(params, views, strict=True):
                self.state[p][name] = t.copy_(p.detach()) if name == "master" else t

    def _keeps_master(self, p: Tensor) -> bool:
        return p.dtype in HALF and self.master != "none"

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Takes over parameters that were written from outside.

        In-place writes (``model.load_state_dict``, ``p.clamp_()``) are noticed at the next step by themselves; those
        past autograd's eyes (``p.data``) are not.
        """
        for p, state in self.state.items():
            if "master" in state:
                master = state["master"]
                # Only where they differ: what the master knows beyond 16 bits stays.
                master.copy_(torch.where(reference.round_master(master, p.dtype) == p, master, p.float()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads our state_dict or torch's, in place and without loss.

        Moments stay fp32 whatever the parameter's dtype (torch would cast them to it), and where a master is missing
        the parameter is taken. Raises ValueError where groups or states do not fit.
        """
        own, groups = self.state, list(self.param_groups)
        given: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            given.update(self._checked(state_dict))  # as the user's own hooks left it
            return given

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
        """``state_dict`` with our options where its groups have none; raises before anything has changed."""
        if len(state_dict["param_groups"]) != len(self.param_groups):
            return state_dict  # torch's own error is clear
        groups = [
            {**{k: v for k, v in own.items() if k != "params"}, **saved}
            for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        for group, own in zip(groups, self.param_groups, strict=True):
            _check_not_differentiable(group)
            for name, p in zip(group["params"], own["params"], strict=False):
                self._check_state(state_dict["state"].get(name), p, group)
        return {**state_dict, "param_groups": groups}

    def _check_state(self, values: dict[str, Any] | None, p: Tensor, group: dict[str, Any]) -> None:
        for name in self._moments(group) if values else ():
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

    @torch.no_grad()
    def _take_state(self, given: dict[str, Any]) -> None:
        names = itertools.chain.from_iterable(group["params"] for group in given["param_groups"])
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        saved = {p: given["state"].get(name) for name, (p, _) in zip(names, params, strict=True)}
        for p, _ in params:
            if not saved[p]:
                self.state.pop(p, None)
        self._init_state((p, group) for p, group in params if saved[p])
        for p, values in saved.items():
            if not values:
                continue
            values = dict(values)
            # A master that is missing, or that a torch optimizer has carried along and cast to 16 bits: it knows
            # nothing of that one's steps. The parameter does.
            master = values.pop("master", None)
            if "master" in self.state[p]:
                self.state[p]["master"].copy_(p if master is None or master.dtype != torch.float32 else master)
            for key, value in values.items():
                kept = self.state[p].get(key)
                if isinstance(kept, Tensor):
                    kept.copy_(torch.as_tensor(value))
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
        """
        outer = self.__dict__.copy()
        self.__dict__.update(grad_scale=grad_scale, found_inf=found_inf, _check_finite=check_finite)
        try:
            yield
        finally:
            for name in ("grad_scale", "found_inf", "_check_finite"):
                self.__dict__.pop(name, None)
                if name in outer:
                    self.__dict__[name] = outer[name]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient. Returns what ``closure`` returned, if one was given.

        Raises:
            RuntimeError: for sparse gradients, and for a backend that was asked for and is not to be had.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches = self._launches()
        self.grad_norm = self._found_inf = None
        if not launches:
            return loss
        records = self._decide(launches)
        hyper = self._hyper_table()
        empty = torch.empty(0, dtype=torch.float32, device="cpu")
        for launch in launches:
            states = [self.state[p] for p in launch.params]
            launch.backend.step_(
                launch.rule,
                launch.params,
                launch.grads,
                [s.get("master", empty) for s in states],
                [s[name] for name in launch.moments for s in states],
                [s["step"] for s in states],
                hyper,
                torch.tensor(launch.groups, dtype=torch.int32, device="cpu"),
                records[launch.params[0].device],
                self.reset_grad,
            )
        if self.reset_grad:
            for launch in launches:
                for grad in launch.lazy:
                    grad.zero_()
        self._versions.update((p, p._version) for launch in launches for p in launch.params if p.dtype in HALF)
        return loss

    def _launches(self) -> list[_Launch]:
        """The parameters that have a gradient, by backend, device and rule; their state made where it is missing."""
        launches: dict[Any, _Launch] = {}
        kinds: dict[Any, _Launch] = {}  # most parameters are of a kind already seen
        fresh, written = [], False
        for index, group in enumerate(self.param_groups):
            rule, moments = self._rule(group), self._moments(group)
            backend_name = "reference" if group.get("fused") is False else self.backend
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                kind = (index, p.device, p.dtype, grad.dtype, grad.layout)
                launch = kinds.get(kind)
                if launch is None:
                    if grad.layout != torch.strided:
                        raise RuntimeError(
                            f"{type(self).__name__} does not support sparse gradients: the parameter of shape "
                            f"{tuple(p.shape)} has one ({grad.layout}); build its layer with sparse=False"
                        )
                    backend = ops.select(backend_name, p.device, p.dtype, grad.dtype)
                    launch = launches.setdefault((id(backend), p.device, rule), _Launch(backend, rule, moments))
                    kinds[kind] = launch
                state = self.state.get(p)
                if not state or moments[-1] not in state or ("master" in state) != self._keeps_master(p):
                    fresh.append((p, group))
                elif "master" in state and self._versions.get(p, p._version) != p._version:
                    written = True  # from outside, since the last step
                if grad.is_neg():  # a lazy view: its memory holds the opposite
                    launch.lazy.append(grad)
                    grad = grad.resolve_neg()
                launch.params.append(p)
                launch.grads.append(grad)
                launch.groups.append(index)
        self._init_state(fresh)
        if written:
            self.refresh_master()
        return list(launches.values())

    def _decide(self, launches: Sequence[_Launch]) -> dict[torch.device, Tensor]:
        """Whether to skip, and what to multiply gradients by: a record for each device."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        home = launches[0].params[0].device
        statistics = None
        if self.max_grad_norm is not None or self._check_finite or self._measure_norm:
            parts = [launch.backend.statistics(launch.grads).to(home) for launch in launches]
            statistics = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        backend = launches[0].backend if len(launches) == 1 else reference
        record = torch.empty(3, dtype=torch.float32, device=home)
        backend.decide_(
            record,
            statistics,
            _on(grad_scale, home),
            _on(found_inf, home),
            self.max_grad_norm or 0.0,
            self._check_finite,
        )
        if statistics is not None:
            self.grad_norm = record[2]
        self._found_inf = record[1]
        return {launch.params[0].device: record.to(launch.params[0].device) for launch in launches}

    def _hyper_table(self) -> Tensor:
        """fp64 [groups, 1 + the rule's values]: the gradient's sign, then what ``_hyper`` says."""
        rows = [[-1.0 if g["maximize"] else 1.0, *map(float, self._hyper(g))] for g in self.param_groups]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _check_not_differentiable(group: dict[str, Any]) -> None:
    if group.get("differentiable"):
        raise ValueError("deepfast: differentiable=True is not supported: the step happens in place")


def _moment_dtype(p: Tensor) -> torch.dtype:
    if p.is_complex():
        return p.dtype
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _on(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    return torch.as_tensor(value, dtype=torch.float32, device=device)
