"""Which parameters a kernel takes together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from deepfast import reference
from deepfast.optim.parts import Parts
from deepfast.optim.shards import Shards, is_flat_shard, local, refuse_flat_shards

STALE = reference.Plan.STALE
UNSEEN = -2  # of a plan that is to find DTensors' gradients, and does not


@dataclasses.dataclass
class Launch:
    """The parameters of one call of a backend: one device, one rule, one way of lying over the ranks.

    ``build`` looks at their state once; after that a step only looks for gradients.
    """

    backend: Any
    device: torch.device
    rule: str
    moments: tuple[str, ...]
    counts_steps: bool
    shards: Shards | None
    distinct: tuple[Any, ...] = ()  # groups whose ranks hold different parameters here
    parts: Parts | None = None  # whoever has cut the parameters, of which these are this rank's parts
    params: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    seeds: list[int] = dataclasses.field(default_factory=list)  # where anything is rounded by chance,
    rounds_weights: bool = False  # weights, too
    waiting: list[Tensor] = dataclasses.field(default_factory=list)  # neither state nor gradient so far
    gradients: int = 0  # found for this step
    overlaps: bool = False  # some parameters lie where others of another launch do
    _after: int = reference.KEPT
    flat: bool = False  # FSDP1's: what is asked of all ranks' gradients has no answer here
    sends: bool = False  # other ranks' weights are written, too
    passing: bool = False  # in the reference because of a gradient: the next one may be the kernels' again
    _copied: list[Tensor] = dataclasses.field(default_factory=list)  # gradients that lie differently
    _layouts: list[Any] = dataclasses.field(default_factory=list)  # of gradients: the plan finds them by these

    def build(self, state: Any) -> None:
        empty = torch.empty(0, dtype=torch.float32, device="cpu")
        states = [state.get(p, {}) for p in self.params]  # plain SGD keeps nothing
        self._locals = [local(p) for p in self.params]
        self._plan = self.backend.Plan(
            self.rule,
            self._locals,
            [local(s.get("master", empty)) for s in states],
            [local(s[name]) for name in self.moments for s in states],
            [s["step"] for s in states] if self.counts_steps else [],
            # (Of a fake tensor the reference could not read them.)
            self.groups if self.backend is reference else torch.tensor(self.groups, dtype=torch.int32, device="cpu"),
        )
        if self.shards is not None:
            self._plan.shards_of(self.params)
        sinks = self.parts.sinks(self.params[0]) if self.parts and self.params else ()
        self.sends = bool(sinks) and hasattr(self._plan, "send_to")
        if self.sends:
            self._plan.send_to(list(sinks))
        if self.seeds:
            self._plan.by_chance(self.seeds, [self._first(p) for p in self.params], self.rounds_weights)
        self.flat = any(map(is_flat_shard, self.params))
        if self.flat and self._plan.needs_norms():
            refuse_flat_shards("layer")

    def _first(self, p: Tensor) -> int:
        """Where in the whole parameter the first element is that this rank has."""
        if self.parts is not None:
            return self.parts.extent(p)[0]
        return 0 if self.shards is None else self.shards.first(p)

    def gather(self, after: int) -> bool:
        """Finds the gradients of this step. False: the plan is stale. after: what becomes of them."""
        if any(p.grad is not None for p in self.waiting):
            self.gradients = STALE
        elif self.shards is None:
            self.gradients = self._plan.gather([], after)
        else:
            self.gradients = self._gather_shards(self.shards, after)
        return self.gradients != STALE

    def _gather_shards(self, shards: Shards, after: int) -> int:
        self._copied, self._after = [], after
        if self._layouts and (found := self._plan.gather([], after)) != UNSEEN:
            return int(found)
        if any(now is not then for now, then in zip(map(local, self.params), self._locals, strict=True)):
            return STALE
        own: list[Any] = [p.grad for p in self.params]
        grads = [None if grad is None else shards.local_grad(grad) for grad in own]
        others = [grad for grad in own if grad is not None and not shards.fit(grad)]
        if after != reference.KEPT:
            self._copied = others
        self._layouts = []
        if own and not others and hasattr(self._plan, "expect"):
            self._expect([None if grad is None else grad._spec for grad in own])
        return self._plan.gather(grads, after) if grads else 0

    def _expect(self, layouts: list[Any]) -> None:
        """Says how the gradients lie. FSDP2 makes new ones for each step, mostly laid out by the same objects."""
        whole: Any = self.params[0]
        self._layouts = layouts  # which must live as long as the plan knows their addresses
        self._plan.expect(list(map(id, layouts)), id(type(whole)), type(whole).__basicsize__, id(whole._spec))

    def statistics(self) -> Tensor:
        """fp64 [2]: sum of squares and number of non-finite elements, of this rank's gradients."""
        if self.gradients == 0:
            return torch.zeros(2, dtype=torch.float64, device=self.device)
        return self._plan.statistics()

    def decide(
        self, record: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None, max_norm: float, check: bool
    ) -> None:
        """``statistics``, and what follows from them, at once."""
        self._plan.decide(record, grad_scale, found_inf, max_norm, check)

    def step(self, hyper: Tensor, lrs: list[Tensor | None], record: Tensor) -> None:
        if self.gradients == 0:
            return  # here for the decision of all ranks
        if self.overlaps:
            self._plan.refresh()
        norms = self._norms(hyper, lrs, record) if self._plan.needs_norms() else None
        self._plan.step(hyper, lrs, record, norms)
        if self.shards is not None:
            for grad in self._copied:
                reference.leave(grad, record, self._after)

    def _norms(self, *how: Any) -> Tensor:
        """fp64 [gradients, 2], of the whole parameters."""
        if self.parts is not None:
            return self.parts.norms(self._plan, [p for p in self.params if p.grad is not None], *how)
        found = self._plan.norms(*how)
        return found if self.shards is None else self.shards.sum_(found)

    def settle(self) -> None:
        """What has been written so far is known; see the plans."""
        self._plan.settle()

    def gradient_memory(self) -> list[reference.Range]:
        """Where each gradient of this step begins and ends."""
        flat = iter(self._plan.gradient_memory())
        return list(zip(flat, flat, strict=True))


def seed_of(seed: int, number: int) -> int:
    """That of an optimizer's parameter by its number: a signed 64-bit integer, as the plans take it."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) % (1 << 64)
    return mixed - (1 << 64) if mixed >> 63 else mixed
