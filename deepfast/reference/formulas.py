"""The update rules in plain torch, one after the other, and the table of them: the twin of ``csrc/math``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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
    lr, beta1, beta2, eps, weight_decay, penalty, bias_correction = hyper.unbind()
    bias1, bias2 = (torch.where(bias_correction != 0, 1 - beta**t, 1.0) for beta in (beta1, beta2))
    m, v = moments[:2]
    _adam_moments(_penalized(g, penalty, p), m, v, beta1, beta2)
    if len(moments) == 3:
        v = moments[2].copy_(torch.maximum(moments[2], v))
    denominator = v.sqrt() * bias2.rsqrt().to(p.dtype) + eps.to(p.dtype)
    return _descended(p, (lr / bias1).to(p.dtype) * (m / denominator), lr * weight_decay)


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


def _lamb_direction(p: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    _, beta1, beta2, eps, weight_decay, _, _ = hyper.unbind()
    m, v = moments
    denominator = v.sqrt() * (1 - beta2**t).rsqrt().to(p.dtype) + eps.to(p.dtype)
    return _penalized(m * (1 / (1 - beta1**t)).to(p.dtype) / denominator, weight_decay, p)


def _lamb_moments(p: Tensor, g: Tensor, moments: list[Tensor], t: Tensor, hyper: Tensor) -> Tensor:
    _adam_moments(g, *moments, *hyper[1:3].unbind())
    return p


def _lamb(p: Tensor, direction: Tensor, norms: Tensor, hyper: Tensor) -> Tensor:
    lr, lower, upper = hyper[0], hyper[5], hyper[6]
    length, unscaled = norms.sqrt().unbind()
    phi = torch.minimum(torch.maximum(length, lower), upper)
    ratio = torch.where((length > 0) & (unscaled > 0), phi / unscaled, 1.0)
    return p - (lr * ratio).to(p.dtype) * direction


NEVER_NEGATIVE = frozenset(("exp_avg_sq", "max_exp_avg_sq", "sum"))
"""Of the moments, those that are sums or averages of squares."""


class Rule(NamedTuple):
    keeps: tuple[str, ...]  # moments, by the names that they have in torch's state
    # (parameter, gradient, moments, step count, hyperparameters) -> new parameter; the moments are updated in place
    formula: Callable[[Tensor, Tensor, list[Tensor], Tensor, Tensor], Tensor]
    counts_steps: bool = True
    # Where norms of whole parameters are needed, the formula only moves the moments, and these give the new parameter:
    # (parameter, moments as they are stored, step count, hyperparameters) -> direction
    direction: Callable[[Tensor, list[Tensor], Tensor, Tensor], Tensor] | None = None
    # (parameter, direction, sums of squares of both, hyperparameters) -> new parameter
    adapt: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    @property
    def moments(self) -> int:
        return len(self.keeps)

    @property
    def moved(self) -> int:
        """Bytes of an fp32 parameter that a step has to move: gradient, parameter and moments read, the last two
        written; where norms come first, these are read once more."""
        again = 1 + self.moments if self.adapt else 0
        return 4 * (1 + 2 * (1 + self.moments) + again)


RULES: dict[str, Rule] = {
    "adam": Rule(("exp_avg", "exp_avg_sq"), _adam),
    "adam_amsgrad": Rule(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _adam),
    "sgd": Rule((), _sgd, counts_steps=False),
    "sgd_momentum": Rule(("momentum_buffer",), _sgd),
    "lion": Rule(("exp_avg",), _lion, counts_steps=False),
    "lamb": Rule(("exp_avg", "exp_avg_sq"), _lamb_moments, direction=_lamb_direction, adapt=_lamb),
    "adagrad": Rule(("sum",), _adagrad),
}
