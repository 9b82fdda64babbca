"""The update rules, one element at a time: the twin of ``csrc/math``, equal to it in every bit.

Each rule has two halves. ``<rule>_prepare`` forms in fp64, once a step and parameter, what does not depend on the
element, and rounds it once. The rule itself works on fp32 registers: constants, parameter, gradient (unscaled and
clipped), moments -> new parameter, new moments.

Three rules keep the bits: every multiply-add is an explicit fma (launches turn contraction off), division and square
root are the IEEE ones, and a sign is changed by ``* -1.0`` (an older Triton's minus subtracts from zero, which turns
0 into 0, not into -0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from deepfast import reference

FLOAT_MAX = tl.constexpr(float.fromhex("0x1.fffffep127"))
SQUARABLE = tl.constexpr(float.fromhex("0x1.fffffep63"))  # its square is below FLOAT_MAX


@triton.jit
def power(base, exponent):
    """base^exponent by repeated squaring: the same bits everywhere, which no library's pow promises."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        if exponent & 1 == 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


@triton.jit
def rest(old, weight):
    """What a moving average keeps: (1 - weight) * old. The shares of old and new then add up to exactly 1."""
    return tl.fma(weight * -1.0, old, old)


@triton.jit
def squarable(g):
    """A finite g whose square fp32 cannot hold, cut to where it can; an infinite second moment would stay for ever."""
    cut = (tl.abs(g) > SQUARABLE) & (tl.abs(g) <= FLOAT_MAX)
    return tl.where(cut, tl.where(g > 0, SQUARABLE, -SQUARABLE), g)


@triton.jit
def penalized(g, decay, p):
    """Weight decay as a penalty; without decay an infinite p does no harm."""
    return tl.where(decay == 0, g, tl.fma(decay, p, g))


@triton.jit
def descended(p, step, decay):
    """One step down with decoupled weight decay, p - (step + decay * p); an infinite p stays what it is."""
    return p - tl.where(tl.abs(p) > FLOAT_MAX, step, tl.fma(decay, p, step))


# Adam: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1. AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
# AMSGrad: Reddi, Kale & Kumar 2018, arXiv:1904.09237, in torch's form (the maximum comes before bias correction).


@triton.jit
def adam_prepare(hyper, t, norms):
    lr, beta1, beta2, eps, weight_decay, penalty, bias_correction = hyper
    decay = lr * weight_decay
    step_size = lr / tl.where(bias_correction != 0, 1.0 - power(beta1, t), 1.0)
    inv_sqrt_bias2 = 1.0 / tl.sqrt(tl.where(bias_correction != 0, 1.0 - power(beta2, t), 1.0))
    return decay, penalty, 1.0 - beta1, 1.0 - beta2, step_size, inv_sqrt_bias2, eps


@triton.jit
def adam_moments(g, m, v, one_minus_beta1, one_minus_beta2):
    g = squarable(g)
    m = one_minus_beta1 * g + rest(m, one_minus_beta1)
    v = tl.fma(one_minus_beta2 * g, g, rest(v, one_minus_beta2))
    return m, v


@triton.jit
def adam(constants, p, g, m, v):
    decay, penalty, one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_bias2, eps = constants
    m, v = adam_moments(penalized(g, penalty, p), m, v, one_minus_beta1, one_minus_beta2)
    step = step_size * tl.div_rn(m, tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps))
    return descended(p, step, decay), m, v


@triton.jit
def adam_amsgrad(constants, p, g, m, v, v_max):
    decay, penalty, one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_bias2, eps = constants
    m, v = adam_moments(penalized(g, penalty, p), m, v, one_minus_beta1, one_minus_beta2)
    v_max = tl.where((v > v_max) | (v != v), v, v_max)  # NaN is not lost
    step = step_size * tl.div_rn(m, tl.fma(tl.sqrt_rn(v_max), inv_sqrt_bias2, eps))
    return descended(p, step, decay), m, v, v_max


# SGD in torch's form, the learning rate outside the buffer; momentum and Nesterov's as in Sutskever et al. 2013, "On
# the importance of initialization and momentum in deep learning".


@triton.jit
def sgd_prepare(hyper, t, norms):
    lr, momentum, dampening, penalty, nesterov = hyper
    weight = tl.where(t == 1, 1.0, 1.0 - dampening)  # of the gradient in the buffer
    return lr, momentum, weight, penalty, nesterov


@triton.jit
def sgd(constants, p, g):
    lr, momentum, weight, penalty, nesterov = constants
    return (tl.fma(lr * -1.0, penalized(g, penalty, p), p),)


@triton.jit
def sgd_momentum(constants, p, g, buffer):
    lr, momentum, weight, penalty, nesterov = constants
    g = penalized(g, penalty, p)
    buffer = tl.fma(momentum, buffer, weight * g)
    direction = tl.where(nesterov != 0, tl.fma(momentum, buffer, g), buffer)
    return tl.fma(lr * -1.0, direction, p), buffer


# Lion: Chen et al. 2023, arXiv:2302.06675, algorithm 2.


@triton.jit
def lion_prepare(hyper, t, norms):
    lr, beta1, beta2, weight_decay = hyper
    return lr, lr * weight_decay, 1.0 - beta1, 1.0 - beta2


@triton.jit
def lion(constants, p, g, m):
    lr, decay, one_minus_beta1, one_minus_beta2 = constants
    c = one_minus_beta1 * g + rest(m, one_minus_beta1)
    m = one_minus_beta2 * g + rest(m, one_minus_beta2)
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))  # zero stays zero, NaN stays NaN
    return descended(p, lr * sign, decay), m


# LAMB: You et al. 2020, arXiv:1904.00962, algorithm 2. Two passes: the first moves the moments on and measures the
# direction, the second finds it again from the moments and goes lr * phi(|p|) / |direction| times as far.


@triton.jit
def lamb_prepare(hyper, t, norms):
    lr, beta1, beta2, eps, weight_decay, lower, upper = hyper
    ratio = 1.0
    if norms is not None:  # sums of squares of the parameter and of its direction, in the second pass
        of_param, of_direction = tl.load(norms), tl.load(norms + 1)
        length = tl.sqrt(of_param)
        phi = tl.where(length < lower, lower, tl.where(length > upper, upper, length))
        ratio = tl.where((of_param > 0) & (of_direction > 0), phi / tl.sqrt(of_direction), 1.0)
    inv_bias1 = 1.0 / (1.0 - power(beta1, t))
    inv_sqrt_bias2 = 1.0 / tl.sqrt(1.0 - power(beta2, t))
    return 1.0 - beta1, 1.0 - beta2, inv_bias1, inv_sqrt_bias2, eps, weight_decay, lr * ratio


@triton.jit
def lamb_direction(constants, p, m, v):
    one_minus_beta1, one_minus_beta2, inv_bias1, inv_sqrt_bias2, eps, weight_decay, step_size = constants
    return penalized(tl.div_rn(m * inv_bias1, tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps)), weight_decay, p)


@triton.jit
def lamb_moments(constants, p, g, m, v):
    return adam_moments(g, m, v, constants[0], constants[1])


@triton.jit
def lamb(constants, p, g, m, v):
    return (tl.fma(constants[6] * -1.0, lamb_direction(constants, p, m, v), p),)


# Adagrad: Duchi, Hazan & Singer 2011, JMLR 12, diagonal form; torch's learning-rate decay.


@triton.jit
def adagrad_prepare(hyper, t, norms):
    lr, lr_decay, penalty, eps = hyper
    return lr / (1.0 + (t - 1).to(tl.float64) * lr_decay), penalty, eps


@triton.jit
def adagrad(constants, p, g, total):
    step_size, penalty, eps = constants
    g = penalized(g, penalty, p)
    total = tl.fma(g, g, total)
    return tl.fma(step_size * -1.0, tl.div_rn(g, tl.sqrt_rn(total) + eps), p), total


@triton.jit
def decided(sum_of_squares, non_finite, grad_scale, found_inf, max_norm, CHECK: tl.constexpr):
    """The step's record (``csrc/math/record.h``): multiplier of the gradients, whether to skip, gradient norm.

    Args:
        sum_of_squares, non_finite: fp64, of the gradients as they are.
        grad_scale, found_inf, max_norm: fp32; no clipping with max_norm = 0.
        CHECK: whether a non-finite gradient skips the step.
    """
    scale = grad_scale.to(tl.float64)
    norm = (tl.sqrt(sum_of_squares) / scale).to(tl.float32)
    coefficient = max_norm.to(tl.float64) / (norm.to(tl.float64) + 1e-6)
    clip = tl.where((coefficient < 1.0) | (coefficient != coefficient), coefficient, 1.0)
    clip = tl.where(max_norm > 0, clip, 1.0)
    overflow = tl.where(found_inf > 0, 1.0, 0.0)
    if CHECK:
        overflow = tl.where(non_finite > 0, 1.0, overflow)
    return (clip / scale).to(tl.float32), overflow, norm


@triton.jit
def transition(
    scale, tracker, left, skipped, overflow,
    GROWTH: tl.constexpr, BACKOFF: tl.constexpr, INTERVAL: tl.constexpr, HYSTERESIS: tl.constexpr,
    CONSECUTIVE: tl.constexpr, DYNAMIC: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The loss scaler's next state; the table stands in :class:`deepfast.LossScaler`. All fp32.

    Dynamic loss scaling: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; hysteresis as in Megatron-LM.
    """
    skipped = tl.where(overflow, skipped + 1.0, skipped)
    if DYNAMIC:
        wide = scale.to(tl.float64)
        smallest, largest = tl.full([], SMALLEST, tl.float64), tl.full([], LARGEST, tl.float64)
        # After an overflow.
        left_over = tl.where(left > 0, left - 1.0, left)
        floor = tl.where(wide < smallest, wide, smallest)  # an overflow never raises the scale
        backed_off = tl.where(wide * BACKOFF > floor, wide * BACKOFF, floor).to(tl.float32)
        backed_off = tl.where(left_over == 0, backed_off, scale)
        # After a clean step.
        grows = tracker + 1.0 >= INTERVAL
        grown = tl.where(wide * GROWTH < largest, wide * GROWTH, largest).to(tl.float32)
        grown = tl.where(grows, grown, scale)
        left_clean = left * 0.0 + HYSTERESIS if CONSECUTIVE else tl.where(grows, HYSTERESIS, left)

        scale = tl.where(overflow, backed_off, grown)
        tracker = tl.where(overflow | grows, 0.0, tracker + 1.0)
        left = tl.where(overflow, left_over, left_clean)
    return scale, tracker, left, skipped


class Rule(NamedTuple):
    """A row of the table of rules, the twin of ``csrc/math/rules.h``. What it keeps and counts, the reference says."""

    moments: int
    counts_steps: bool
    hyper: int  # values in a row of hyperparameters, the gradient's sign included
    prepare: Callable[..., Any]
    constants: int  # how many prepare returns
    update: Callable[..., Any]
    # Where norms of whole parameters are needed: what the first pass makes of the moments, and the direction that it
    # measures, and the second takes, of moments as they are stored
    move: Callable[..., Any] | None = None
    direction: Callable[..., Any] | None = None


def _rule(name: str, *row: Any) -> Rule:
    return Rule(reference.RULES[name].moments, reference.RULES[name].counts_steps, *row)


RULES = {
    "adam": _rule("adam", 8, adam_prepare, 7, adam),
    "adam_amsgrad": _rule("adam_amsgrad", 8, adam_prepare, 7, adam_amsgrad),
    "sgd": _rule("sgd", 6, sgd_prepare, 5, sgd),
    "sgd_momentum": _rule("sgd_momentum", 6, sgd_prepare, 5, sgd_momentum),
    "lion": _rule("lion", 5, lion_prepare, 4, lion),
    "lamb": _rule("lamb", 8, lamb_prepare, 7, lamb, lamb_moments, lamb_direction),
    "adagrad": _rule("adagrad", 5, adagrad_prepare, 3, adagrad),
}
