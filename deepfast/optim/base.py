"""What all optimizers have in common: how one is made, and its step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from deepfast import graphs
from deepfast.optim import asked_whole, lost
from deepfast.optim.decide import decide
from deepfast.optim.hyper import check_numbers
from deepfast.optim.loading import Loadable
from deepfast.optim.options import ALIVE, asked_for
from deepfast.optim.plan import Planned
from deepfast.optim.reach import Distinct, say_distinct
from deepfast.optim.shards import is_flat_shard
from deepfast.optim.state import HALF
from deepfast.optim.warned import warn
from deepfast.optim.watched import States
from deepfast.optim.wrapped import Shared, Verdict, check_seen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Optimizer(Loadable, Planned):
    """Base of all optimizers; not used by itself.

    Keyword arguments beyond torch's:

    Args:
        master: where a 16-bit parameter's fp32 value is kept. "auto" and "split": in the parameter and, in the state,
            an int16 tensor with what it lacks (``csrc/codec/split.h``: exact but for fp16 below 2^-17, where it is off
            by at most 2^-40); "fp32": as an fp32 tensor in the state; "none": nowhere, the parameter itself is updated
            and rounded to nearest even, as in torch; a warning says once if most updates are lost to that.
        state_dtype: how moments are kept: "fp32", "bf16" (rounded to nearest even), "int8" (in groups of 64 elements,
            1.03 bytes each, rounded by chance: ``csrc/codec/int8.h``; a 1-D int8 or uint8 tensor; keeps step counts),
            or "param", in the parameter's type; or a dictionary with one of these for each moment by its name
            ({"exp_avg": "bf16"}), others in fp32. (A bf16 moment that should fall by less than 0.2 to 0.4 % a step
            stays: no second one with beta2 > 0.996. An int8 one falls.) Moments of fp64 and complex parameters are
            always of their type.
        max_grad_norm: clip the gradients to this global L2 norm (over all groups) inside the step. FSDP1's flat shards
            do not show it: an error.
        reset_grad: zero the gradients in the step's own pass, skipped steps included.
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch, slow); "auto" follows
            ``$DEEPFAST_BACKEND``.
        rounding: how weights without a master are rounded: "nearest", or "stochastic": up or down by chance, so that
            they are right on average and no update is lost. (Saturates where "nearest" overflows; keeps step counts.)
        seed: of all chance, which is a function of it, the parameter's number, the step and the element's place: the
            same on any backend and, where parameters are cut along their first dimension, on any number of ranks.

    Attributes:
        grad_norm: after a step the global gradient norm, unscaled, before clipping, a 0-d fp32 tensor on the
            parameters' device; None where neither clipping nor a :class:`deepfast.LossScaler` asked for it.
        grad_scale: what the gradients have been multiplied by (set by a gradient scaler around the step), or None.
        found_inf: a tensor that is > 0 where the step is to be skipped (set likewise), or None.
    """

    # In common with a wrapper of the optimizer (wrapped.py): what a scaler or the engine hands over, what came of it.
    grad_norm = Shared[Tensor | None](None)
    grad_scale = Shared[Tensor | None]()
    found_inf = Verdict[Tensor | None]()
    _check_finite: Any = Shared(False)  # see _scaled
    _statistics: Any = Shared(None)  # of this step's gradients, all of them, where the engine knows them already
    _found_inf: Any = Shared(None)  # what the last step decided
    _leaves_gradients: Any = Shared(False)  # grad_scale or not: they are not written
    _distinct: Any = Shared(Distinct())  # what distinct_over was told
    _reach: Any = Shared(None)  # the ranks over which a plan's figures are added up, once they are asked for
    _compared: Any = Shared(False)  # whether ranks that are taken to hold the same do (reach.py)
    _has_stepped: Any = Shared(False)  # a step has seen what was handed over
    _sent = True  # the last step has written the weights of all ranks that step parts (parts.py)
    _in_backward: Any = None  # whoever steps the parameters one by one (in_backward.py)
    loss_scaler: Any  # set by deepfast.Engine under fp16
    _measure_norm = False  # set by deepfast.Engine: fill grad_norm even where nothing clips

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        is_module = isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList)
        if is_module or isinstance(params, Mapping) or not isinstance(params, Iterable):
            raise TypeError(
                f"deepfast: {type(self).__name__} takes parameters, or a list of groups of them, not "
                f"{type(params).__name__}" + (": give its parameters()" if is_module else "")
            )
        defaults |= asked_for(params, options)
        self._shared: dict[str, Any] = {}
        self._given = {}
        self._forget_plan()
        check_numbers(defaults)
        self._check(defaults)
        super().__init__(params, defaults)
        self.state = States()
        ALIVE.add(self)
        self._check_forms()
        if self.master == "none" and self.rounding == "nearest":
            lost.watch(self, "without master='none' they add up in a master")

    def _check_forms(self) -> None:
        """Raises ValueError for moments that there are not, and warns of what is asked for in vain."""
        state_dtype = self.state_dtype
        known = list(dict.fromkeys(name for group in self.param_groups for name in self._moments(group)))
        asked = state_dtype if isinstance(state_dtype, dict) else {}
        for name in asked:
            if name not in known:
                kept = ", ".join(known) or "none"
                raise ValueError(
                    f"deepfast: state_dtype: there is no moment {name!r}; {type(self).__name__} keeps {kept}"
                )
        if state_dtype != "fp32" and not known:
            warn(f"deepfast: state_dtype has no effect: {type(self).__name__} keeps no moment")
        if self.rounding == "stochastic" and not any(p.dtype in HALF for p in self._params()):
            warn("deepfast: rounding has no effect: no parameter is 16 bits wide")

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps only defaults, state and groups of an optimizer that is copied or pickled."""
        own = {"_measure_norm": self._measure_norm, "_launches": [], "_planned": None, "_parts": None, "_given": {}}
        return {**super().__getstate__(), **own, "_distinct": self._distinct}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shared = {}
        super().__setstate__(state)
        self._distinct = self.__dict__.pop("_distinct", Distinct())
        self.state = States(self.state)
        ALIVE.add(self)

    def distinct_over(self, group: ProcessGroup | DeviceMesh, params: Iterable[Tensor] | None = None) -> None:
        """Says that the ranks of ``group`` hold different parameters here, which no DTensor tells of.

        That is so for experts of one's own, stages of a pipeline, plain tensors that are parts of one. From then on
        gradient norms and overflows are those of all of them. Every rank of the group says it, and takes part in each
        step that asks for a norm or looks for overflows, also one that has no gradient. It stands in no state_dict;
        copies of the optimizer keep it, pickled ones do not.

        Args:
            group: a ``ProcessGroup`` that this rank is in, or a ``DeviceMesh`` of one dimension.
            params: those parameters; None: all, also those that are added later. None of them, ``()``: the ranks only
                agree about overflows.

        Raises:
            ValueError: for another group, and for parameters that are not this optimizer's.
        """
        say_distinct(self, group, params)

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
        if self._in_backward is not None:
            return True  # so that a scaler comes to where it is refused
        params = list(self._params())
        if any(map(is_flat_shard, params)):
            return False
        dtypes = {t.dtype for p in params for t in (p, p.grad) if t is not None}
        return torch.float16 in dtypes or any(group.get("fused") for group in self.param_groups)

    @property
    def cur_scale(self) -> float:
        """The loss scale of the engine that steps this, as DeepSpeed calls it; an AttributeError without one."""
        return self.loss_scaler.get_scale()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...

    # Not torch.compiler.disable: that imports the compiler with this module, this one where it is first called.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient. Returns what ``closure`` returned, if one was given.

        Raises:
            RuntimeError: for sparse gradients, and for a backend that was asked for and is not to be had.
        """
        self._has_stepped = True
        if not self.state and asked_whole.asks():
            self.init_state()
            return None
        if self._in_backward is not None:
            return self._in_backward.end(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches = self._gather()
        for launch in launches:
            if graphs.capturing(launch.device):
                self._check_capture(launch.device)
        self.grad_norm = self._found_inf = None
        self._sent = all(launch.sends for launch in launches)
        if not launches:
            return loss
        records = decide(self, launches)
        for launch in launches:
            launch.step(*self._hyper_table(launch.device), records[launch.device])
        for launch in launches if len(launches) > 1 else ():
            launch.settle()  # the others may have written to views of the same memory
        if self._planned is None:
            self._forget_plan()
        return loss
