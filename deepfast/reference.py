"""Every operation in plain torch, in any dtype up to fp64 and complex.

The oracle in tests, and what runs where no kernel does: slower, the same result to rounding. The functions have the
names and arguments of the compiled operators, so a backend is whichever of the two is asked (:mod:`deepfast.ops`).
None of them reads a value back to the host.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FP16_MAX = 65504.0
_BF16_MAX_BITS = 0x7F7F


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _wide(t: Tensor) -> Tensor:
    """``t`` in the precision it is computed in: fp64 stays, everything narrower becomes fp32; complex as real pairs."""
    t = _real(t)
    return t if t.dtype == torch.float64 else t.float()


def refresh(master: Tensor, weight: Tensor) -> None:
    """Where a master rounds to another weight, it becomes the weight. The rest knows more than 16 bits, and stays."""
    master.copy_(torch.where(round_master(master, weight.dtype) == weight, master, weight.float()))


def round_master(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` as the 16-bit weight whose master it is: saturates; bf16 rounds half away from zero, fp16 to even.

    Infinities and NaN stay what they are.
    """
    if dtype == torch.float16:
        return torch.where(x.isfinite(), x.clamp(-_FP16_MAX, _FP16_MAX), x).to(dtype)
    if dtype == torch.bfloat16:
        bits = x.contiguous().view(torch.int32).to(torch.int64) & 0x7FFFFFFF
        magnitude = ((bits + 0x8000) >> 16).clamp(max=_BF16_MAX_BITS)
        rounded = (magnitude << 16).to(torch.int32).view(torch.float32).copysign(x)
        return torch.where(x.isfinite(), rounded, x).to(dtype)
    return x.to(dtype)


def statistics(grads: Sequence[Tensor]) -> Tensor:
    """[sum of squares, number of non-finite elements] over all ``grads``, fp64."""
    grads = [g.resolve_conj() for g in grads]
    squares = [_real(g).double().square().sum() for g in grads]
    non_finite = [(~_real(g).isfinite()).sum().double() for g in grads]
    return torch.stack([torch.stack(squares).sum(), torch.stack(non_finite).sum()])


def reduced(tensors: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """The sum over the ranks' ``tensors``, times ``factor`` (1 / ranks for a mean); see ``csrc/math/collective.h``.

    16-bit tensors and fp32 ones are added in fp32, in rank order, and rounded once; a sum beyond fp32's range is formed
    again in fp64 before it is multiplied, so the mean of finite values is finite.
    """
    dtype = tensors[0].dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        total = functools.reduce(torch.add, tensors)
        return total * factor if dtype == torch.float64 else total
    factor32 = torch.tensor(factor, dtype=torch.float32)
    narrow = functools.reduce(torch.add, [t.float() for t in tensors]) * factor32
    wide = functools.reduce(torch.add, [t.double() for t in tensors]) * factor32.double()
    return torch.where(narrow.isfinite(), narrow, wide.float()).to(dtype)


def decide_(
    record: Tensor,
    statistics: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float,
    check: bool,
) -> None:
    """Fills ``record`` (fp32[3]: multiplier, found_inf, grad_norm); see ``csrc/math/record.h``."""
    scale = record.new_ones((), dtype=torch.float64) if grad_scale is None else grad_scale.reshape(()).double()
    found = record.new_zeros(()) if found_inf is None else (found_inf.reshape(()) > 0).float()
    norm = record.new_zeros(())
    clip = torch.ones_like(scale)
    if statistics is not None:
        norm = (statistics[0].sqrt() / scale).float()
        if check:
            found = torch.maximum(found, (statistics[1] > 0).float())
        if max_norm > 0:
            clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    record.copy_(torch.stack([(clip / scale).float(), found, norm]))


def _average(old: Tensor, weight: Tensor, *x: Tensor) -> None:
    """old <- (1 - weight) * old + weight * product of x; the two shares of an fp32 weight add up to exactly 1."""
    weight = weight.to(old.dtype).double()
    old.copy_(old.double() * (1 - weight) + weight * math.prod(t.double() for t in x))


def _penalized(g: Tensor, decay: Tensor, p: Tensor) -> Tensor:
    """Weight decay as a penalty; an infinite parameter does no harm where there is none."""
    return torch.where(decay == 0, g, g + decay.to(p.dtype) * p)


def _descended(p: Tensor, step: Tensor, decay: Tensor) -> Tensor:
    """One step down with decoupled weight decay; an infinite parameter stays what it is."""
    return p - torch.where(p.isinf(), step, step + decay.to(p.dtype) * p)


def _adam_moments(g: Tensor, m: Tensor, v: Tensor, beta1: Tensor, beta2: Tensor) -> None:
    # A finite gradient is cut to where its square is finite, too: an infinite second moment would stay for ever.
    limit = torch.finfo(g.dtype).max ** 0.5 * (1 - torch.finfo(g.dtype).eps)
    g = torch.where(g.isfinite(), g.clamp(-limit, limit), g)
    _average(m, 1 - beta1, g)
    _average(v, 1 - beta2, g, g)


def _adam(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    lr, beta1, beta2, eps, weight_decay, penalty = hyper.unbind()
    m, v = moments[:2]
    _adam_moments(_penalized(g, penalty, p), m, v, beta1, beta2)
    if len(moments) == 3:
        v = moments[2].copy_(torch.maximum(moments[2], v))
    denominator = v.sqrt() * (1 - beta2**t).rsqrt().to(p.dtype) + eps.to(p.dtype)
    return _descended(p, (lr / (1 - beta1**t)).to(p.dtype) * (m / denominator), lr * weight_decay)


def _sgd(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    lr, momentum, dampening, penalty, nesterov = hyper.unbind()
    g = _penalized(g, penalty, p)
    if moments:
        weight = torch.where(t == 1, 1.0, 1 - dampening).to(p.dtype)
        buffer = moments[0].mul_(momentum.to(p.dtype)).add_(weight * g)
        g = torch.where(nesterov != 0, g + momentum.to(p.dtype) * buffer, buffer)
    return p - lr.to(p.dtype) * g


def _lion(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    lr, beta1, beta2, weight_decay = hyper.unbind()
    c = moments[0].clone()
    _average(c, 1 - beta1, g)
    _average(moments[0], 1 - beta2, g)
    return _descended(p, lr.to(p.dtype) * torch.where(c.isnan(), c, c.sign()), lr * weight_decay)


def _adagrad(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    lr, lr_decay, penalty, eps = hyper.unbind()
    g = _penalized(g, penalty, p)
    total = moments[0].add_(g * g)
    return p - (lr / (1 + (t - 1) * lr_decay)).to(p.dtype) * (g / (total.sqrt() + eps.to(p.dtype)))


def _lamb_direction(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    _, beta1, beta2, eps, weight_decay, _, _ = hyper.unbind()
    m, v = moments
    _adam_moments(g, m, v, beta1, beta2)
    denominator = v.sqrt() * (1 - beta2**t).rsqrt().to(p.dtype) + eps.to(p.dtype)
    return _penalized(m * (1 / (1 - beta1**t)).to(p.dtype) / denominator, weight_decay, p)


def _lamb(p: Tensor, direction: Tensor, norms: Tensor, hyper: Tensor) -> Tensor:
    lr, lower, upper = hyper[0], hyper[5], hyper[6]
    length, unscaled = norms.sqrt().unbind()
    phi = torch.minimum(torch.maximum(length, lower), upper)
    ratio = torch.where((length > 0) & (unscaled > 0), phi / unscaled, 1.0)
    return p - (lr * ratio).to(p.dtype) * direction


def mark(p: Tensor) -> tuple[int, int]:
    """Version counter and address of ``p``, which tell whether somebody has written to it or moved it."""
    lies = p.device.type in ("cpu", "cuda") and type(p).__torch_dispatch__ is Tensor.__torch_dispatch__
    return 0 if p.is_inference() else p._version, p.data_ptr() if lies else 0


class Rule(NamedTuple):
    moments: int
    # (parameter, gradient, moments, step count, hyperparameters) -> new parameter; the moments are updated in place
    formula: Callable[[Tensor, Tensor, list[Tensor], Tensor, Tensor], Tensor]
    counts_steps: bool = True
    # Where norms of whole parameters are needed, the formula gives a direction, and this the new parameter:
    # (parameter, direction, sums of squares of both, hyperparameters) -> new parameter
    adapt: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


RULES: dict[str, Rule] = {
    "adam": Rule(2, _adam),
    "adam_amsgrad": Rule(3, _adam),
    "sgd": Rule(0, _sgd, counts_steps=False),
    "sgd_momentum": Rule(1, _sgd),
    "lion": Rule(1, _lion, counts_steps=False),
    "lamb": Rule(2, _lamb_direction, adapt=_lamb),
    "adagrad": Rule(1, _adagrad),
}


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
        unscaled = _wide(grad) * record[0].to(_wide(grad).dtype)
        _real(grad).copy_(torch.where(record[1] > 0, _real(grad), unscaled.to(_real(grad).dtype)))


class Plan:
    """An optimizer's parameters and their state, as the kernels' ``Plan`` keeps them (``csrc/bindings/plan.h``).

    Args:
        rule: a key of ``RULES``.
        params: n tensors, any floating dtype and layout.
        masters: n fp32 tensors, an empty one where there is none.
        moments: as many times n as the rule keeps, all first moments first.
        steps: n one-element tensors, or none where the rule does not count.
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
        self._versions: list[int | None] = [None] * len(params)  # of parameters when their masters were last right
        self._grads: list[Tensor | None] = []
        self._stepped: list[int] = []
        self._after = KEPT
        self._directions: list[Tensor] = []

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
        self._refresh(i for i, _ in self._active() if mark(self._params[i])[0] != self._versions[i])
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
        self._versions = [mark(p)[0] for p in self._params]

    def refresh(self) -> None:
        """Masters take over what has been written to their weights, by whoever."""
        self._refresh(i for i, _ in self._active())

    def _refresh(self, which: Iterable[int]) -> None:
        for i in which:
            if self._masters[i] is not None:
                refresh(self._weight(i), self._params[i])

    def settle(self) -> None:
        """What has been written to the parameters so far is known to their masters."""
        for i in self._stepped:
            self._versions[i] = mark(self._params[i])[0]

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
        master = self._masters[i]
        return self._params[i] if master is None else _held(master)

    def _formula(self, i: int, grad: Tensor, row: Tensor, record: Tensor) -> Tensor:
        """Moves the moments of parameter ``i`` on, unless the step is skipped. Returns what the formula gives."""
        multiplier, found_inf, _ = record.unbind()
        p = _wide(self._weight(i))
        moments = [_real(_held(m)) for m in self._moments[i :: len(self._kinds)][: self._rule.moments]]
        new_moments = [_wide(m).clone() for m in moments]
        g = _wide(grad.resolve_conj()).to(p.dtype) * (multiplier * row[0]).to(p.dtype)
        counts = self._rule.counts_steps
        t = (_held(self._steps[i]) + 1).double().reshape(()) if counts else torch.zeros((), device=p.device)
        new = self._rule.formula(p, g, new_moments, t, row[1:])
        for old, updated in zip(moments, new_moments, strict=True):
            old.copy_(torch.where(found_inf > 0, old, updated.to(old.dtype)))
        return new

    def norms(self, hyper: Tensor, lrs: Sequence[Tensor | None], record: Tensor) -> Tensor:
        """fp64 [gradients, 2]: sums of squares of each parameter and its direction. Moves the moments on."""
        self._directions = [self._formula(i, g, self._row(i, hyper, lrs), record) for i, g in self._active()]
        pairs = [
            [_wide(self._weight(i)).double().square().sum(), direction.double().square().sum()]
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
            weight, param = self._weight(i), self._params[i]
            p = _wide(weight)
            row = self._row(i, hyper, lrs)
            if self._rule.adapt is None or norms is None:
                new = self._formula(i, grad, row, record)
            else:
                new = self._rule.adapt(p, self._directions[nth], norms[nth], row[1:])
            new = torch.where(skipped, p, new)
            if weight is not param:
                param.copy_(torch.where(skipped, param, round_master(new, param.dtype)))
            _real(weight).copy_(new)
            if self._rule.counts_steps:
                count = _held(self._steps[i])
                count.copy_(torch.where(skipped, count, count + 1))
            leave(grad, record, self._after)
        if self._after == RESET:
            detach([grad for _, grad in self._active()])
        self._stepped = [i for i, _ in self._active()]
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


def accumulate_(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float, overwrite: bool) -> None:
    """sums[i] = weight * grads[i], or += without ``overwrite``; fp32."""
    for total, grad in zip(sums, grads, strict=True):
        if overwrite:
            total.copy_(grad).mul_(weight)
        else:
            total.add_(grad.to(total.dtype), alpha=weight)


def scaler_update_(
    state: Tensor,
    found_inf: Sequence[Tensor],
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
    consecutive_hysteresis: bool,
    dynamic: bool,
    min_scale: float,
    max_scale: float,
) -> None:
    """The loss scaler's transition over ``state`` (fp32[4]: scale, growth tracker, hysteresis left, skipped steps)."""
    scale, tracker, left, skipped = state.unbind()
    overflow = torch.stack([f.reshape(()).to(state.device) > 0 for f in found_inf]).any()
    skipped = skipped + overflow
    if dynamic:
        left_overflow = (left - 1).clamp(min=0)
        backed_off = torch.maximum(scale.double() * backoff_factor, scale.double().clamp(max=min_scale)).float()
        grows = tracker + 1 >= growth_interval
        grown = torch.where(grows, (scale.double() * growth_factor).clamp(max=max_scale).float(), scale)
        refilled = torch.full_like(left, hysteresis)
        left_clean = refilled if consecutive_hysteresis else torch.where(grows, refilled, left)
        scale = torch.where(overflow, torch.where(left_overflow == 0, backed_off, scale), grown)
        tracker = torch.where(overflow | grows, torch.zeros_like(tracker), tracker + 1)
        left = torch.where(overflow, left_overflow, left_clean)
    state.copy_(torch.stack([scale, tracker, left, skipped]))
