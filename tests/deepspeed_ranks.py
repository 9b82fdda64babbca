"""Run by test_deepspeed_names.py on two ranks, in which ``deepspeed`` is deepfast's."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from checks import run_checks
from engines import batches, engine, train

from deepfast.engine.ranks import of_rank_0

STAGE_2 = {"train_batch_size": 16, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


def check_comm_is_torchs():
    from deepspeed import comm

    assert comm.get_rank() == comm.get_local_rank() == RANK
    assert comm.get_world_size() == 2
    t = torch.full((2,), RANK + 1.0)
    comm.all_reduce(t)
    assert torch.equal(t, torch.full((2,), 3.0))
    out = torch.empty(2)
    comm.all_gather_into_tensor(out, torch.tensor([float(RANK)]))
    assert out.tolist() == [0.0, 1.0]


def check_before_there_is_a_group_a_rank_knows_its_number():
    assert BEFORE == (RANK, 2)


def check_the_group_is_that_of_all_ranks():
    from deepspeed.utils import groups

    assert groups._get_data_parallel_world_size() == 2
    assert groups._get_data_parallel_rank() == RANK
    assert groups._get_data_parallel_group_ranks() == [0, 1]


def check_what_one_rank_has_made_of_parameters_reaches_all():
    import deepspeed

    for modifier in (0, 1):
        e = engine(STAGE_2)
        train(e, batches(8)[RANK::2])
        weight = e.module[0].weight
        with deepspeed.zero.GatheredParameters([weight, weight], modifier_rank=modifier):
            if modifier == RANK:
                weight.data.copy_(torch.arange(weight.numel()).view_as(weight) / 7)
        expected = (torch.arange(weight.numel()).view_as(weight) / 7).bfloat16()
        assert torch.equal(weight, expected)


def check_and_the_masters_start_from_it():
    """A step that changes nothing writes every weight anew from its master, whichever rank has that."""
    import deepspeed

    for modifier in (0, 1):
        e = engine({**STAGE_2, "optimizer": {"params": {"lr": 0.01, "master": "fp32"}}})
        train(e, batches(8)[RANK::2])
        with deepspeed.zero.GatheredParameters(e.module.parameters(), modifier_rank=modifier), torch.no_grad():
            for p in e.module.parameters():
                if modifier == RANK:
                    p.fill_(0.25)
        for group in e.optimizer.param_groups:
            group["lr"] = 0.0
        train(e, batches(8)[RANK::2])
        for p in e.module.parameters():
            assert (p == 0.25).all(), p


def check_without_a_modifier_everybody_keeps_its_own():
    import deepspeed

    p = torch.nn.Parameter(torch.zeros(2))
    with deepspeed.zero.GatheredParameters(p):
        p.data.fill_(RANK)
    with deepspeed.zero.GatheredParameters(p, modifier_rank=0, enabled=False):
        p.data.add_(1)
    assert (p == RANK + 1).all()


def check_the_masters_of_a_sharded_checkpoint_are_whole():
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = Path(of_rank_0(tempfile.mkdtemp(dir=sys.argv[1])))
    e = engine(STAGE_2)
    train(e, batches(8)[RANK::2])
    e.save_checkpoint(folder)
    values = get_fp32_state_dict_from_zero_checkpoint(folder)
    for part in e._parts():
        name = next(name for name, p in e.module.named_parameters() if p is part.whole)
        own = values[name].reshape(-1)[part.begin : part.end]
        assert torch.equal(own, e.optimizer.get_master(part.mine).reshape(-1)), name
    for name, p in e.module.named_parameters():
        assert not torch.equal(values[name], p.float()), "more than the weight's 16 bits"
        assert torch.allclose(values[name], p.float(), rtol=2**-8)


CHECKS = {name: check for name, check in vars().items() if name.startswith("check_")}

if __name__ == "__main__":
    import deepfast.deepspeed

    torch.set_num_threads(1)
    BEFORE = (deepfast.deepspeed.comm.get_rank(), deepfast.deepspeed.comm.get_world_size())
    deepfast.deepspeed.comm.barrier()  # makes the group
    RANK = dist.get_rank()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
