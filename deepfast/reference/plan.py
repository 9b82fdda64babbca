"""The step over an optimizer's parameters: the twin of ``csrc/bindings/plan.h``, in plain torch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from deepfast.reference.codec import master_of, master_value, real, refresh, round_master, wide
from deepfast.reference.formulas import RULES
from deepfast.reference.int8 import GROUPED, order_of, pack, unpack
from deepfast.reference.noise import dither, noise, stochastic
from deepfast.reference.operators import decide_, statistics


def mark(p: Tensor) -> tuple[int, int]:
    """Version counter and address of ``p``, which tell whether somebody has written to it or moved it."""
    lies = p.device.type in ("cpu", "cuda") and type(p).__torch_dispatch__ is Tensor.__torch_dispatch__
    return 0 if p.is_inference() else p._version, p.data_ptr() if lies else 0


def _held(t: weakref.ref[Tensor]) -> Tensor:
    """The state tensor, which the optimizer's state dictionary must still hold."""
    held = t()
    if held is None:
        raise RuntimeError("deepfast: a tensor of the optimizer's state is gone")
    return held


KEPT, RESET, WRITTEN = range(3)
"""What a step leaves of a gradient: what it was; zeros, skipped steps included; what it was taken for, unscaled and
clipped. (``Afterwards`` in ``csrc/span.h``.)"""

Range = tuple[int, int]
"""Where a tensor begins in memory, and where it ends."""


def check_distinct(gradients: Sequence[Range]) -> None:
    """What is written to a gradient that another parameter has yet to read would change that one's update."""
    found = sorted((begin, end) for begin, end in gradients if begin < end)
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(found)):
        raise RuntimeError(
            "deepfast: two parameters share one gradient tensor, and the step would write to it (reset_grad, or a "
            "GradScaler's unscaling) before both have read it"
        )


def detach(gradients: Sequence[Tensor]) -> None:
    """One that was made with create_graph=True holds on to its graph; a zero has none, as after ``zero_grad``."""
    for grad in gradients:
        if grad.requires_grad and not grad._is_view():
            grad.detach_()


def leave(grad: Tensor, record: Tensor, after: int) -> None:
    """What a step with ``record`` leaves of ``grad``."""
    if after == RESET:
        grad.zero_()
    elif after == WRITTEN:
        unscaled = wide(grad) * record[0].to(wide(grad).dtype)
        real(grad).copy_(torch.where(record[1] > 0, real(grad), unscaled.to(real(grad).dtype)))


class Plan:
    """An optimizer's parameters and their state, as the kernels' ``Plan`` keeps them (``csrc/bindings/plan.h``).

    Args:
        rule: a key of ``RULES``.
        params: n tensors, any floating dtype and layout.
        masters: n tensors, fp32, or int16 where they are split (``csrc/codec/split.h``); an empty one where there is
            none.
        moments: as many times n as the rule keeps, all first moments first, in the types they are stored in; in 8 bits
            as :mod:`deepfast.reference.int8` says.
        steps: n one-element tensors, or none where neither the rule counts nor chance is asked for.
        groups: int32 [n], or a list, each parameter's row of hyperparameters.

    Like theirs it does not keep the state alive.
    """

    STALE = -1

    def __init__(
        self,
        rule: str,
        params: Sequence[Tensor],
        masters: Sequence[Tensor],
        moments: Sequence[Tensor],
        steps: Sequence[Tensor],
        groups: Tensor | Sequence[int],
    ) -> None:
        self._rule = RULES[rule]
        self._params = params
        self._masters = [weakref.ref(t) if t.numel() else None for t in masters]
        self._moments, self._steps = list(map(weakref.ref, moments)), list(map(weakref.ref, steps))
        self._groups = [int(group) for group in groups]
        self._kinds = [(p.device, p.dtype) for p in params]
        self._addresses = [mark(p)[1] for p in params]
        self._wholes: list[Tensor] = []
        self._known: list[int | None] = [None] * len(params)  # writes to parameters when their masters were last right
        self._grads: list[Tensor | None] = []
        self._stepped: list[int] = []
        self._after = KEPT
        self._directions: list[Tensor] = []
        self._chance = [(0, 0)] * len(params)
        self._rounds_weights = False

    def by_chance(self, seeds: Sequence[int], first: Sequence[int], weights: bool) -> None:
        """Of what is rounded by chance (``csrc/codec/noise.h``): moments in 8 bits; step counts are needed.

        seeds: 64 bits for each parameter. first: where in the whole one its first element is. weights: those without a
        master are rounded so, too.
        """
        self._chance, self._rounds_weights = list(zip(seeds, first, strict=True)), weights

    def shards_of(self, wholes: Sequence[Tensor]) -> None:
        """The parameters are this rank's shards of these DTensors, to which all writes count, too."""
        self._wholes = list(wholes)

    def _writes(self, i: int) -> int:
        return mark(self._params[i])[0] + (self._wholes[i]._version if self._wholes else 0)

    def needs_norms(self) -> bool:
        return self._rule.adapt is not None

    def gather(self, grads: Sequence[Tensor | None], after: int) -> int:
        """Finds the gradients (each parameter's own, unless they are given) and returns how many there are.

        ``STALE`` where a parameter has changed its type or its place, or a gradient is sparse. Masters of weights that
        somebody else has written to take over what was written. after: what becomes of the gradients.
        """
        found = list(grads) or [p.grad for p in self._params]
        if (
            self._kinds != [(p.device, p.dtype) for p in self._params]
            or self._addresses != [mark(p)[1] for p in self._params]
            or any(g is not None and g.layout != torch.strided for g in found)
        ):
            return self.STALE
        self._grads, self._after, self._stepped = found, after, []
        if after != KEPT:
            flat = iter(self.gradient_memory())
            check_distinct(list(zip(flat, flat, strict=True)))
        self._refresh(i for i, _ in self._active() if self._writes(i) != self._known[i])
        return sum(g is not None for g in found)

    def gradient_memory(self) -> list[int]:
        """Of what ``gather`` has found: where each gradient begins and ends."""
        out = []
        for _, grad in self._active():
            begin = mark(grad)[1]
            extent = 1 + sum((size - 1) * stride for size, stride in zip(grad.shape, grad.stride(), strict=True))
            out += [begin, begin + extent * grad.itemsize if begin and grad.numel() else begin]
        return out

    def trust(self) -> None:
        """The masters are as they are to be, whatever their weights are now."""
        self._known = [self._writes(i) for i in range(len(self._params))]

    def refresh(self) -> None:
        """Masters take over what has been written to their weights, by whoever."""
        self._refresh(i for i, _ in self._active())

    def _refresh(self, which: Iterable[int]) -> None:
        for i in which:
            if (master := self._masters[i]) is not None:
                refresh(_held(master), self._params[i])

    def settle(self) -> None:
        """What has been written to the parameters so far is known to their masters."""
        for i in self._stepped:
            self._known[i] = self._writes(i)

    def _active(self) -> Iterator[tuple[int, Tensor]]:
        return ((i, g) for i, g in enumerate(self._grads) if g is not None)

    def statistics(self) -> Tensor:
        return statistics([g for _, g in self._active()])

    def decide(
        self, record: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None, max_norm: float, check: bool
    ) -> None:
        """``statistics``, and what follows from them: see :func:`decide_`."""
        decide_(record, self.statistics(), grad_scale, found_inf, max_norm, check)

    def _row(self, i: int, hyper: Tensor, lrs: Sequence[Tensor | None]) -> Tensor:
        """The hyperparameters of parameter ``i``, on its device."""
        group = self._groups[i]
        row = hyper[group].to(self._params[i].device)
        lr = lrs[group] if lrs else None
        return row if lr is None else torch.cat([row[:1], lr.detach().reshape(1).to(row), row[2:]])

    def _weight(self, i: int) -> Tensor:
        """Parameter ``i`` in the precision that it is computed in."""
        master = self._masters[i]
        return wide(self._params[i]) if master is None else master_value(_held(master), self._params[i])

    def _formula(self, i: int, grad: Tensor, row: Tensor, record: Tensor) -> Tensor:
        """Moves the moments of parameter ``i`` on, unless the step is skipped. Returns what the formula gives."""
        multiplier, found_inf, _ = record.unbind()
        p = self._weight(i)
        kept = self._kept(i)
        new_moments = [self._moment(m, i).clone() for m in kept]
        g = wide(grad.resolve_conj()).to(p.dtype) * (multiplier * row[0]).to(p.dtype)
        counts = self._rule.counts_steps
        t = (_held(self._steps[i]) + 1).double().reshape(()) if counts else torch.zeros((), device=p.device)
        new = self._rule.formula(p, g, new_moments, t, row[1:])
        for nth, (old, updated) in enumerate(zip(kept, new_moments, strict=True)):
            if old.dtype in GROUPED:
                (seed, first), steps = self._chance[i], _held(self._steps[i]) + 1
                chance = dither(seed, steps, nth, first, updated.numel())
                updated = pack(updated, old.dtype, chance, order_of(self._params[i]))
            old.copy_(torch.where(found_inf > 0, old, updated.to(old.dtype)))
        if self._rule.direction is not None:  # of the moments as they are stored
            new = self._rule.direction(p, [self._moment(m, i) for m in kept], t, row[1:])
        return new

    def _kept(self, i: int) -> list[Tensor]:
        """The moments of parameter ``i`` as they are stored."""
        return [real(_held(m)) for m in self._moments[i :: len(self._kinds)][: self._rule.moments]]

    def _moment(self, kept: Tensor, i: int) -> Tensor:
        param = self._params[i]
        return unpack(kept, param.shape, order_of(param)) if kept.dtype in GROUPED else wide(kept)

    def norms(self, hyper: Tensor, lrs: Sequence[Tensor | None], record: Tensor) -> Tensor:
        """fp64 [gradients, 2]: sums of squares of each parameter and its direction. Moves the moments on."""
        self._directions = [self._formula(i, g, self._row(i, hyper, lrs), record) for i, g in self._active()]
        pairs = [
            [self._weight(i).double().square().sum(), direction.double().square().sum()]
            for (i, _), direction in zip(self._active(), self._directions, strict=True)
        ]
        return torch.tensor([]).reshape(0, 2) if not pairs else torch.stack([torch.stack(pair) for pair in pairs])

    def step(self, hyper: Tensor, lrs: Sequence[Tensor | None], record: Tensor, norms: Tensor | None) -> None:
        """One step over all parameters that have a gradient.

        Args:
            hyper: fp64 [groups, k], a row being the gradient's sign (-1 to maximize) and the rule's own values.
            lrs: nothing, or for each group a tensor on the parameters' device (one fp32 or fp64 value) that stands for
                the learning rate in its row, ``hyper[group, 1]``; None where the row holds.
            record: fp32 [3], as ``decide_`` fills it. Where found_inf > 0 nothing is written but the gradient reset.
            norms: what :meth:`norms` gave (summed over ranks), where the rule needs norms.
        """
        skipped = record[1] > 0
        for nth, (i, grad) in enumerate(self._active()):
            param, kept, p = self._params[i], self._masters[i], self._weight(i)
            row = self._row(i, hyper, lrs)
            if self._rule.adapt is None or norms is None:
                new = self._formula(i, grad, row, record)
            else:
                new = self._rule.adapt(p, self._directions[nth], norms[nth], row[1:])
            new = torch.where(skipped, p, new)
            if kept is None and self._rounds_weights and param.dtype in (torch.float16, torch.bfloat16):
                seed, first = self._chance[i]
                chance = noise(seed, _held(self._steps[i]) + 1, first, param) >> 16
                param.copy_(torch.where(skipped, param, stochastic(new, param.dtype, chance)))
            elif kept is None:
                real(param).copy_(new)
            else:
                master = _held(kept)
                master.copy_(torch.where(skipped, master, master_of(new, param.dtype, master.dtype)))
                param.copy_(torch.where(skipped, param, round_master(new, param.dtype)))
            if self._steps:
                count = _held(self._steps[i])
                count.copy_(torch.where(skipped, count, count + 1))
            leave(grad, record, self._after)
        if self._after == RESET:
            detach([grad for _, grad in self._active()])
        self._stepped = [i for i, _ in self._active()]
        if self._wholes:
            increment_version([self._wholes[i] for i in self._stepped])
        self.settle()
        self._grads, self._directions = [], []


def step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Tensor,
    record: Tensor,
    reset_grad: bool,
) -> None:
    """One step of ``rule`` without keeping a plan; the arguments are those of :class:`Plan` and its ``step``."""
    plan = Plan(rule, params, masters, moments, steps, groups)
    plan.trust()
    plan.gather(grads, reset_grad)
    plan.step(hyper, [], record, plan.norms(hyper, [], record) if plan.needs_norms() else None)
