"""Run by test_fully_shard.py: GPT-2 in fp16, cut over four ranks, resumed on two, beside one process.

fp32 parameters, fp16 compute, clipping inside the step, two forced overflows and a checkpoint in the middle.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from beside_whole import gathered, sharded_backward, whole_backward
from checks import run_checks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import deepfast

PARTS = 4  # of the batch: on two ranks each takes two of them, one after the other
FIRST, LAST = 6, 12  # steps: until the checkpoint, and in all
TOO_HIGH, POISONED = 0, 3  # steps that overflow: the scale begins too high, and a gradient is infinite
LR, EPS, CLIP = 1e-2, 1e-2, 1.0


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def loss_of(out):
    """In fp32, as GPT-2 is trained."""
    logits, labels = out
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class Model(torch.nn.Module):
    """Gives logits, and what they should have been."""

    def __init__(self):
        super().__init__()
        self.gpt2 = gpt2()

    def forward(self, tokens):
        return self.gpt2(tokens[:, :-1]).logits, tokens[:, 1:]


def tokens(step):
    """Sequences that can be learned: each token is the one before, and a little."""
    g = torch.Generator().manual_seed(step)
    start, stride = torch.randint(61, (8, 1), generator=g), torch.randint(1, 3, (8, 1), generator=g)
    return (start + stride * torch.arange(9)) % 61


def made(model):
    optimizer = deepfast.AdamW(model.parameters(), lr=LR, eps=EPS, max_grad_norm=CLIP)
    return optimizer, deepfast.LossScaler("cpu", init_scale=2.0**18, growth_interval=4)


def train(model, optimizer, scaler, backward, begin, end):
    """[(loss, scale, skipped steps, gradient norm)]"""
    trace = []
    for step in range(begin, end):
        optimizer.zero_grad()
        loss = backward(tokens(step), scaler.scale)
        if step == POISONED:
            grad = dict(model.named_parameters())["gpt2.transformer.ln_f.weight"].grad
            if not isinstance(grad, DTensor):
                grad[0] = float("inf")
            elif dist.get_rank() == 0:  # on one rank alone
                grad.to_local()[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        trace.append((loss, scaler.get_scale(), scaler.skipped_steps, optimizer.grad_norm.clone()))
    return trace


def sharded(rank, size):
    def backward(x, scale):
        """This rank's parts, whose gradients fully_shard adds up over the ranks, and here over the parts."""
        losses = []
        for part in range(rank, PARTS, size):
            losses.append(sharded_backward(model, x, part, PARTS, scale, loss_of))
        for p in model.parameters():
            p.grad.mul_(size / PARTS)  # not the loss: fp16 would overflow elsewhere
        return torch.stack(losses).mean()

    model = Model()
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.gpt2.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model, backward


def check_beside_one_process():
    rank, size = dist.get_rank(), dist.get_world_size()
    begin, end = (0, FIRST) if size == PARTS else (FIRST, LAST)
    plain = Model()
    theirs = made(plain)

    def whole(x, scale):
        return whole_backward(plain, x, PARTS, torch.float16, torch.float32, scale, loss_of)

    expected = train(plain, *theirs, whole, 0, LAST)
    model, backward = sharded(rank, size)
    optimizer, scaler = made(model)
    if begin:
        state, optim = get_state_dict(model, optimizer)
        kept = {"model": state, "optim": optim, "scaler": scaler.state_dict()}
        dcp.load(kept, checkpoint_id=CHECKPOINT)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optim)
        scaler.load_state_dict(kept["scaler"])
    found = train(model, optimizer, scaler, backward, begin, end)
    # Gradients of 11 bits are added up in fp32, in another order: off by 2^-22 of the ranks' own, and a master by
    # LR / EPS times that a step. Where that takes a weight across the middle between two fp16 numbers, forward sees
    # it in its last place, 2^-11 of one weight of 30,000: the losses and norms then have about that.
    for (loss, scale, skipped, norm), (other_loss, *others, other_norm) in zip(found, expected[begin:end], strict=True):
        assert [scale, skipped] == others
        torch.testing.assert_close(loss, other_loss, rtol=2.0**-11, atol=0)
        torch.testing.assert_close(norm, other_norm, rtol=2.0**-11, atol=0, equal_nan=True)
    skips = [skipped for _, _, skipped, _ in expected]
    assert {TOO_HIGH, POISONED} <= {step for step in range(LAST) if skips[step] > (skips[step - 1] if step else 0)}
    assert skips[FIRST - 1] < FIRST - 2, "it steps before the checkpoint"
    assert expected[-1][0] < 0.95 * expected[0][0], "it learns"
    assert any(norm > CLIP for *_, norm in expected if norm.isfinite()), "it clips"
    if end == LAST:
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(gathered(p), q.detach(), rtol=0, atol=LAST * LR / EPS * 2.0**-22 * CLIP)
    if not begin:
        state, optim = get_state_dict(model, optimizer)
        dcp.save({"model": state, "optim": optim, "scaler": scaler.state_dict()}, checkpoint_id=CHECKPOINT)


CHECKS = {"beside one process": check_beside_one_process}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    CHECKPOINT = Path(sys.argv[1], "checkpoint")
    run_checks(CHECKS, Path(sys.argv[1], f"{dist.get_rank()}.json"), dist.barrier)
    dist.destroy_process_group()
