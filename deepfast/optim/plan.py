"""The plan of an optimizer's steps: its parameters dealt out to launches, kept until something else is to be done."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deepfast import ops, reference
from deepfast.optim import memory
from deepfast.optim.launch import Launch, seed_of
from deepfast.optim.parts import Parts
from deepfast.optim.reach import Distinct, Kind
from deepfast.optim.shards import Shards, local
from deepfast.optim.state import Stateful, is_wrapper
from deepfast.optim.watched import look, unwatched


class _Identity(TorchFunctionMode):
    """Within, a tensor equals itself alone: lists of thousands are compared by identity at the speed of C."""

    def __torch_function__(self, *_: Any, **__: Any) -> bool:
        return False


class Member(NamedTuple):
    p: Tensor
    number: int  # among all of the optimizer's parameters
    group: dict[str, Any]
    row: int  # the group's, among the groups


class Planned(Stateful):
    """The part of :class:`deepfast.optim.Optimizer` that finds, for each step, the gradients and who takes them."""

    _launches: list[Launch]
    _parts: Parts | None = None  # set by an engine whose ranks step a part of each parameter
    _planned: tuple[Any, list[Tensor], list[Tensor]] | None  # what the launches were made from
    _reach: Any  # the ranks over which their figures are added up
    _distinct: Distinct

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
        return [launch for launch in self._launches if launch.gradients or launch.shards or self._distinct]

    def _seen(self, loose: list[Tensor]) -> Any:
        """All that a plan depends on, but for the parameters. loose: those with state that nobody watches."""
        groups = [(self._rule(group), self._moments(group), len(group["params"])) for group in self.param_groups]
        options = [self.defaults.get(name) for name in ("master", "state_dtype", "rounding", "seed", "backend")]
        return groups, options, self._distinct, id(self.state), look(self.state, loose)

    def _forget_plan(self) -> None:
        self._launches, self._planned, self._reach = [], None, None

    def _found_gradients(self) -> bool:
        """False: some launch's plan is stale. All are asked: another rank may be waiting for this one."""
        after = self._afterwards()
        found = [launch.gather(after) for launch in self._launches]
        if all(found) and after != reference.KEPT and len(self._launches) > 1:
            reference.check_distinct([r for launch in self._launches for r in launch.gradient_memory()])
        return all(found)

    def _plan(self) -> None:
        """Deals the parameters out to launches."""
        seen: set[int] = set()
        for p in self._params():
            if id(p) in seen:
                raise RuntimeError(f"deepfast: a parameter of shape {tuple(p.shape)} is in the groups twice")
            seen.add(id(p))
        self._launches = self._deal(self._members(), memory.layers(map(local, self._params())))

    def _members(self) -> Iterator[Member]:
        numbers = itertools.count()
        for row, group in enumerate(self.param_groups):
            for p in group["params"]:
                yield Member(p, next(numbers), group, row)

    def _deal(self, members: Iterable[Member], layers: dict[int, int]) -> list[Launch]:
        """Launches for some parameters, whose state is made where it is missing. layers: see :func:`memory.layers`."""
        launches: dict[Any, Launch] = {}
        fresh, backend, by_chance = [], self.backend, self._by_chance()
        for p, number, group, row in members:
            layer = layers.get(id(local(p)))
            place = Shards.of(p), self._distinct.over(number)
            launch = self._launch_of(launches, p, p.grad, self._rule(group), backend, place, group, layer)
            if not self._has_state(p, group):
                if p.grad is None:
                    launch.waiting.append(p)
                    continue
                fresh.append((p, group))
            launch.params.append(p)
            launch.groups.append(row)
            if by_chance:
                launch.seeds.append(seed_of(self.seed, number))
        self._init_state(fresh)
        for launch in launches.values():
            launch.build(self.state)
        return list(launches.values())

    def _launch_of(
        self,
        launches: dict[Any, Launch],
        p: Tensor,
        grad: Tensor | None,
        rule: str,
        backend_name: str,
        place: Kind,
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
            if grad.is_neg() or is_wrapper(local(grad)):  # a lazy view, whose memory holds the opposite
                backend_name = "reference"
            if p.is_meta and group.get("fused"):
                raise RuntimeError(
                    "`fused=True` requires all the params to be floating point Tensors of supported devices, "
                    f"but a parameter of shape {tuple(p.shape)} lies on {p.device}: give it memory (to_empty) first"
                )
        if is_wrapper(local(p)):
            backend_name = usual = "reference"
        backend = ops.select(backend_name, p.device, p.dtype, dtype)
        parts = self._parts
        sinks = parts.sinks(p) if parts else ()
        key = (
            id(backend),
            p.device,
            rule,
            place,
            layer,
            sinks,
        )  # what lies in one place is stepped one after the other
        if key not in launches:
            moments, counts = self._moments(group), self._counts_steps(group)
            launches[key] = Launch(backend, p.device, rule, moments, counts, *place, parts)
            launches[key].overlaps = layer is not None
            launches[key].rounds_weights = self.rounding == "stochastic"
        launches[key].passing |= backend is reference and ops.select(usual, p.device, p.dtype) is not reference
        return launches[key]
