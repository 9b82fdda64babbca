"""Which parameters a kernel takes together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from deepfast import reference
from deepfast.optim.shards import Shards, is_flat_shard, is_sharded, local, refuse_flat_shards

STALE = reference.Plan.STALE


def mark(p: Tensor) -> tuple[int, ...]:
    """Changes when somebody writes to ``p``, or gives it other memory."""
    own = reference.mark(local(p))
    # A DTensor counts for itself: what is written through it does not show in its shard's counter.
    return (p._version, *own) if is_sharded(p) else own


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
    params: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    waiting: list[Tensor] = dataclasses.field(default_factory=list)  # neither state nor gradient so far
    gradients: int = 0  # found for this step
    flat: bool = False  # FSDP1's: what is asked of all ranks' gradients has no answer here
    _copied: list[Tensor] = dataclasses.field(default_factory=list)  # gradients that lie differently

    def build(self, state: Any) -> None:
        empty = torch.empty(0, dtype=torch.float32, device="cpu")
        states = [state.get(p, {}) for p in self.params]  # plain SGD keeps nothing
        self._versions = [p._version for p in self.params] if self.shards else []
        self._locals = [local(p) for p in self.params]
        self._plan = self.backend.Plan(
            self.rule,
            self._locals,
            [local(s.get("master", empty)) for s in states],
            [local(s[name]) for name in self.moments for s in states],
            [s["step"] for s in states] if self.counts_steps else [],
            torch.tensor(self.groups, dtype=torch.int32, device="cpu"),
        )
        self.flat = any(map(is_flat_shard, self.params))
        if self.flat and self._plan.needs_norms():
            refuse_flat_shards("layer")

    def gather(self, reset_grad: bool) -> bool:
        """Finds the gradients of this step. False: the plan is stale."""
        if any(p.grad is not None for p in self.waiting):
            self.gradients = STALE
        elif self.shards is None:
            self.gradients = self._plan.gather([], reset_grad)
        else:
            self.gradients = self._gather_shards(self.shards, reset_grad)
        return self.gradients != STALE

    def _gather_shards(self, shards: Shards, reset_grad: bool) -> int:
        if self._versions != [p._version for p in self.params]:
            return STALE
        if any(now is not then for now, then in zip(map(local, self.params), self._locals, strict=True)):
            return STALE
        own = [p.grad for p in self.params]
        grads = [None if grad is None else shards.local_grad(grad) for grad in own]
        self._copied = [g for g in own if g is not None and not shards.fit(g)] if reset_grad else []
        return self._plan.gather(grads, reset_grad) if grads else 0

    def statistics(self) -> Tensor:
        """fp64 [2]: sum of squares and number of non-finite elements, over all ranks."""
        found = self._plan.statistics()
        return found if self.shards is None else self.shards.sum_(found)

    def decide(
        self, record: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None, max_norm: float, check: bool
    ) -> None:
        """``statistics``, and what follows from them, at once."""
        self._plan.decide(record, grad_scale, found_inf, max_norm, check)

    def step(self, hyper: Tensor, lrs: list[Tensor | None], record: Tensor) -> None:
        norms = self._plan.norms(hyper, lrs, record) if self._plan.needs_norms() else None
        if norms is not None and self.shards is not None:
            self.shards.sum_(norms)
        self._plan.step(hyper, lrs, record, norms)
        if self.shards is not None:
            torch.autograd.graph.increment_version([p for p in self.params if p.grad is not None])
            for grad in self._copied:
                grad.zero_()
            self._versions = [p._version for p in self.params]

    def marks(self) -> dict[Tensor, tuple[int, ...]]:
        """Of each parameter, after its last step."""
        flat = self._plan.marks()
        own: list[tuple[int, ...]] = list(zip(flat[::2], flat[1::2], strict=True))
        if self.shards is not None:
            own = [(version, *rest) for version, rest in zip(self._versions, own, strict=True)]
        return dict(zip(self.params, own, strict=True))
