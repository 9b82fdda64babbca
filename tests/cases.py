"""The optimizers, each with its peer and its variants; parameters and gradients to feed them."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

import deepfast
from deepfast.optimizers import OPTIMIZERS


class PaperLion(torch.optim.Optimizer):
    """arXiv:2302.06675, algorithm 2, word for word; and how close to zero the sign's argument has come."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                c = beta1 * m + (1 - beta1) * g
                state["closest"] = torch.minimum(state.get("closest", c.abs()), c.abs())
                p.copy_(p - lr * (torch.where(c.isnan(), c, c.sign()) + decay * p))
                m.copy_(beta2 * m + (1 - beta2) * g)


class PaperLAMB(torch.optim.Optimizer):
    """arXiv:1904.00962, algorithm 2, word for word."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 phi=(0.0, float("inf")), maximize=False):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "phi": phi,
                                  "maximize": maximize})  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                u = r + decay * p
                length, norm = p.norm().item(), u.norm().item()
                ratio = min(max(length, group["phi"][0]), group["phi"][1]) / norm if length > 0 and norm > 0 else 1.0
                p.copy_(p - lr * ratio * u)


class BertAdam(torch.optim.Optimizer):
    """arXiv:1412.6980, algorithm 1, without its correction of bias, as BERT was trained; what torch adds to it, too."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *,
                 maximize=False, decoupled_weight_decay=False, bias_correction=False):  # fmt: skip
        assert not bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad":
                                  amsgrad, "maximize": maximize, "decoupled": decoupled_weight_decay})  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                p, g = (torch.view_as_real(t) if t.is_complex() else t for t in (parameter, parameter.grad))
                g = -g if group["maximize"] else g
                g = g if group["decoupled"] else g + decay * p
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), most=torch.zeros_like(p))
                m, v, most = state["exp_avg"], state["exp_avg_sq"], state["most"]
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                most.copy_(torch.maximum(most, v))
                v = most if group["amsgrad"] else v
                p.copy_(p - lr * m / (v.sqrt() + group["eps"]) - (lr * decay * p if group["decoupled"] else 0.0))


class BertAdamW(BertAdam):
    """With decoupled weight decay."""

    def __init__(self, params, lr=1e-3, **options):
        super().__init__(params, lr, **{"weight_decay": 1e-2, "decoupled_weight_decay": True, **options})


NAMES = tuple(OPTIMIZERS)
DROPINS = tuple(name for name in NAMES if hasattr(torch.optim, name))
OURS = {name: getattr(deepfast, name) for name in NAMES}
COUNTING = tuple(n for n in NAMES if (o := OURS[n]([nn.Parameter(torch.zeros(1))]))._counts_steps(o.param_groups[0]))
PEERS = {
    "Lion": PaperLion,
    "LAMB": PaperLAMB,
    **{name: getattr(torch.optim, name) for name in DROPINS},
}
UNCORRECTED = {"Adam": BertAdam, "AdamW": BertAdamW}  # their peers with bias_correction=False, which torch's have not

_ADAM = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "decay": {"weight_decay": 0.3},
    "everything": {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
    "betas": {"betas": (0.5, 0.6), "eps": 1e-3},
    "zero betas": {"betas": (0.0, 0.0)},
    "uncorrected": {"bias_correction": False},
    "all uncorrected": {"bias_correction": False, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
}
VARIANTS = {
    "Adam": {**_ADAM, "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True}},
    "AdamW": _ADAM,
    "SGD": {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
        "decay": {"weight_decay": 0.3},
    },
    "Lion": {
        "plain": {},
        "decay": {"weight_decay": 0.3},
        "maximize": {"maximize": True},
        "betas": {"betas": (0.5, 0.0)},
    },
    "LAMB": {
        "plain": {},
        "no decay": {"weight_decay": 0.0},
        "decay": {"weight_decay": 0.3},
        "maximize": {"maximize": True},
        "betas": {"betas": (0.0, 0.5), "eps": 1e-3},
        "phi": {"phi": (2.0, 10.0)},
    },
    "Adagrad": {
        "plain": {},
        "decays": {"lr_decay": 0.5, "weight_decay": 0.1},
        "initial": {"initial_accumulator_value": 0.1, "eps": 1e-3},
        "maximize": {"maximize": True},
    },
}
EVERY = [(name, variant) for name in NAMES for variant in VARIANTS[name]]
# One of each that uses all it has: moments, decay, what the first step does differently.
TYPICAL = {
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1, "amsgrad": True},
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "Lion": {"weight_decay": 0.1},
    "LAMB": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
}
# What each rule takes, after the gradient's sign.
HYPER = {
    "adam": [0.1, 0.9, 0.99, 1e-8, 0.01, 0.02, 1.0],
    "adam_amsgrad": [0.1, 0.9, 0.99, 1e-8, 0.01, 0.02, 1.0],
    "sgd": [0.1, 0.0, 0.0, 0.01, 0.0],
    "sgd_momentum": [0.1, 0.9, 0.5, 0.01, 0.0],
    "lion": [0.1, 0.9, 0.99, 0.01],
    "lamb": [0.1, 0.9, 0.99, 1e-6, 0.01, 0.0, 10.0],
    "adagrad": [0.1, 0.5, 0.01, 1e-10],
}
# What a configuration adds to a learning rate.
CONFIGURED = {
    "Adam": {"adam_w_mode": False, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Lion": {"betas": [0.9, 0.95]},
    "LAMB": {"eps": 1e-5},
    "Adagrad": {"lr_decay": 0.1},
}
# What the sign of a complex number is, or its norm, neither the papers nor torch say.
REAL_ONLY = ("Lion", "LAMB")
SHAPES = [(64, 33), (5,), (), (0, 3), (3000, 7), (1, 4097)]
HALVES = (torch.float16, torch.bfloat16)
# Three ways to run the same tests. On a CPU: "cuda" is what the fixture cuda_on_host gives. On a GPU, with
# DEEPFAST_TEST_DEVICE=cuda. And Triton's kernels in its interpreter, with TRITON_INTERPRET=1, which makes all of Triton
# run there: in a process of its own.
DEVICE = os.environ.get("DEEPFAST_TEST_DEVICE", "cpu")
if DEVICE == "cuda":
    BACKENDS = ["cuda", "triton", "reference"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS = ["triton"]
else:
    BACKENDS = ["cpu", "cuda", "reference"]


def peer_of(name: str, params: list[nn.Parameter], **options) -> torch.optim.Optimizer:
    """Who should make the same steps with these options."""
    return (PEERS if options.get("bias_correction", True) else UNCORRECTED)[name](params, **options)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=g, dtype=torch.float64, device="cpu") for s in shapes]
    return [nn.Parameter(value.to(torch.get_default_device(), dtype)) for value in values]


def give_gradients(*lists: list[nn.Parameter], seed=0, scale=1.0) -> None:
    """The same random gradients to every list, each in its parameters' dtype."""
    for params in lists:
        g = torch.Generator().manual_seed(seed)
        for p in params:
            grad = torch.randn(p.shape, generator=g, dtype=torch.float64, device="cpu") * scale
            p.grad = grad.to(p.device, p.dtype)


def difference(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True) if x.numel())


def decided(oracle: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """Where a sign has never hung by a rounding error (there, either one is right); True for all without a sign."""
    return oracle.state[p].get("closest", torch.tensor(1.0)) > 1e-6


def trained(cls, params, steps=3, **options):
    optimizer = cls(params, lr=1e-2, **options)
    for i in range(steps):
        give_gradients(params, seed=i)
        optimizer.step()
    return optimizer


def stepped(params, name="AdamW", **options):
    optimizer = OURS[name](params, **options)
    give_gradients(params)
    optimizer.step()
    return optimizer


def kept(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """What the optimizer knows of the parameter's value: the master where there is one."""
    return optimizer.get_master(p) if "master" in optimizer.state[p] else p
