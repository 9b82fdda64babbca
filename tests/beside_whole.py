"""Training with fully_shard beside one process that has the whole batch: for fully_shard_ranks.py and its like.

The one process does what the ranks do together. It takes each rank's part of the batch through the same operations in
the same types (a 16-bit product over eight rows is not the sum of four over two: each is rounded by itself), adds the
gradients up, and steps. So what may differ is the order in which four numbers are added, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import deepfast

ROWS = 8  # of a batch, of all ranks


def net(dtype: torch.dtype = torch.float32, widths: Sequence[int] = (6, 10, 3), bias: bool = True) -> nn.Sequential:
    """Of its usual widths over four ranks: 10 rows are 3, 3, 3 and 1; of 3 the last rank has none."""
    torch.manual_seed(0)
    first, hidden, last = widths
    return nn.Sequential(nn.Linear(first, hidden, bias), nn.GELU(), nn.Linear(hidden, last, bias)).to(dtype)


def batch(step: int, width: int = 6) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(step))


def loss_of(out: Tensor) -> Tensor:
    return out.float().square().mean()


def unscaled(loss: Tensor) -> Tensor:
    return loss


def whole_backward(
    model: nn.Module,
    x: Tensor,
    parts: int,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    scale: Callable[[Tensor], Tensor] = unscaled,
    loss_of: Callable[[Tensor], Tensor] = loss_of,
) -> Tensor:
    """Gradients of ``x`` in ``parts`` equal parts, as ranks make and average them. Returns the loss.

    Args:
        compute: the type of weights and inputs in forward and backward; None: the parameters'.
        reduce: the type in which the parts' gradients are added up; None: that of ``compute``.
    """
    names, params = zip(*model.named_parameters(), strict=True)
    sums: list[Tensor] = []
    losses = []
    for part in x.chunk(parts):
        weights = [p.detach().to(compute or p.dtype).requires_grad_() for p in params]
        inputs = part.to(weights[0].dtype) if part.is_floating_point() else part
        loss = loss_of(torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (inputs,)))
        grads = [g.to(reduce or g.dtype) for g in torch.autograd.grad(scale(loss), weights)]
        sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
        losses.append(loss.detach())
    for p, total in zip(params, sums, strict=True):
        p.grad = (total / parts).to(p.dtype)
    return torch.stack(losses).mean()


def sharded_backward(
    model: nn.Module,
    x: Tensor,
    part: int,
    parts: int,
    scale: Callable[[Tensor], Tensor] = unscaled,
    loss_of: Callable[[Tensor], Tensor] = loss_of,
) -> Tensor:
    """This rank's share of that. Returns the mean loss of all ranks."""
    inputs = x.chunk(parts)[part]
    loss = loss_of(model(inputs.to(next(model.parameters()).dtype) if x.is_floating_point() else inputs))
    scale(loss).backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def gathered(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


LR, EPS, CLIP, STEPS = 0.01, 0.1, 0.5, 5
EXACT = 0  # no bit differs
POISONED = 2  # the step in which one gradient of one rank is infinite, under a loss scaler


def tolerance(bits: int) -> float:
    """How far apart weights may come where gradients are added up in numbers of ``bits`` bits.

    Three additions, each off by half a unit: 3 * 2^-bits of the ranks' gradients, clipped to CLIP. AdamW's step moves
    with its gradient by at most 2 / EPS of that (once through the first moment, once through the root of the second),
    so in STEPS steps by STEPS * LR * 2 / EPS; as much again for what the weights then do to the gradients (LR / EPS is
    0.1). And each step rounds a weight below 1 to fp32.

    Numbers of 8 or 11 bits that are added up in fp32 (24) lose none, unless they lie further apart than 2^10: there
    nothing differs at all.
    """
    return 2 * STEPS * LR * 2 / EPS * 3 * 2.0**-bits * CLIP + STEPS * 2.0**-25 if bits else 0.0


def follow(
    model: nn.Module,
    plain: nn.Module,
    mine: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
    theirs: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
    bits: int,
    scaled: bool = False,
    inputs: Callable[[int], Tensor] = batch,
    **options: object,
) -> tuple[deepfast.AdamW, deepfast.AdamW]:
    """Trains ``model`` on all ranks and ``plain`` on each, and compares them at every step. Returns the optimizers.

    Args:
        mine, theirs: backward of the two, given a batch and what scales the loss; they return the loss.
        bits: see :func:`tolerance`.
        scaled: by a LossScaler; then one gradient of the last rank that has some of the first weight overflows once.
    """
    options = {"lr": LR, "eps": EPS, "max_grad_norm": CLIP, **options}
    a, b = deepfast.AdamW(model.parameters(), **options), deepfast.AdamW(plain.parameters(), **options)
    scalers = [deepfast.LossScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    first, unsharded = next(model.parameters()), next(plain.parameters())
    for step in range(STEPS):
        x, before = inputs(step), gathered(first).clone()
        a.zero_grad(), b.zero_grad()
        losses = [
            run(x, scaler.scale if scaled else unscaled) for run, scaler in zip((mine, theirs), scalers, strict=True)
        ]
        torch.testing.assert_close(*losses, rtol=2.0**-20, atol=2 * tolerance(bits))
        if scaled and step == POISONED:
            unsharded.grad[-1, -1] = float("inf")
            with torch.no_grad():
                poison_last(first.grad)
        for optimizer, scaler in zip((a, b), scalers, strict=True):
            scaler.step(optimizer) if scaled else optimizer.step()
            scaler.update() if scaled else None
        skipped = scaled and step == POISONED
        assert torch.equal(before, gathered(first)) == skipped
        if not skipped:
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=8 * 2.0**-bits if bits else 0.0, atol=0)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            close(a.get_master(p), b.get_master(q), tolerance(bits))
            if not bits:
                assert torch.equal(gathered(p), q.detach())
    assert [s.get_scale() for s in scalers] == [2.0**9 if scaled else 2.0**10] * 2
    assert [s.skipped_steps for s in scalers] == [int(scaled)] * 2
    return a, b


def poison_last(grad: Tensor) -> None:
    """Makes the last element of a DTensor of rows infinite: on one rank, wherever that element lies."""
    marked = torch.zeros(grad.shape, device=grad.device)
    marked[-1, -1] = float("inf")
    grad.to_local().add_(distribute_tensor(marked, grad.device_mesh, grad.placements, src_data_rank=None).to_local())


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(gathered(found), gathered(expected), rtol=0, atol=atol)
