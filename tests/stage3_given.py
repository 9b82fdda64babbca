"""Run by test_stage3.py on 2 and 4 ranks: stage 3 with what the caller brings, optimizers and modules in parts."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import stage3_ranks
import torch
import torch.distributed as dist
import towers
from stage3_ranks import CLOSE, EXACT, both
from torch import nn
from towers import RANK, SIZE, compare, engine, kept, loss_of, step_of

import deepfast


def check_whoever_made_the_optimizer():
    def trained(stage, make):
        net = towers.Tower()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.5,
            "fp16": {"enabled": True, "initial_scale_power": 8},
        }
        optimizer, options = make(net)
        e, optimizer, *_ = deepfast.initialize(model=net, optimizer=optimizer, config=config, **options)
        assert e.optimizer is optimizer
        for step in range(3):
            step_of(e, step, lambda step, nth: float("nan") if step == 1 and nth == 0 else 1.0)
        assert e.skipped_steps == 1
        return e

    def groups(net):
        matrices = [p for p in net.parameters() if p.ndim > 1]
        rest = [p for p in net.parameters() if p.ndim < 2]
        return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]

    def stepped(net):
        optimizer = deepfast.AdamW(groups(net), lr=0.01)
        g = torch.Generator().manual_seed(3)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer, {}

    makers = {
        "ours": lambda net: (deepfast.AdamW(groups(net), lr=0.01), {}),
        "torch's": lambda net: (torch.optim.AdamW(groups(net), lr=0.01), {}),
        "a function": lambda net: (lambda params: deepfast.Lion(params, lr=0.01), {"model_parameters": groups(net)}),
        "a generator": lambda net: (
            lambda params: deepfast.SGD(params, lr=0.1),
            {"model_parameters": net.parameters()},
        ),
        "has stepped": stepped,
    }
    for name, make in makers.items():
        a, b = trained(0, make), trained(3, make)
        assert [len(g["params"]) for g in a.optimizer.param_groups] == [
            len(g["params"]) for g in b.optimizer.param_groups
        ]
        found, expected = kept(b), kept(a)
        if name == "a function":  # the sign of what is nearly zero
            found, expected = ({k: v for k, v in one.items() if "exp_avg" in k} for one in (found, expected))
        compare(found, expected, CLOSE["fp16"])
    # One that nothing here has an equal of, in fp32 on DTensors.
    e = trained(3, lambda net: (torch.optim.RMSprop(net.parameters(), lr=1e-3), {}))
    assert isinstance(e.optimizer, torch.optim.RMSprop)
    assert not torch.equal(towers.whole(e._params()[0]), towers.Tower().embedding.weight)


def check_another_librarys_optimizer_clips_by_the_same_norm():
    net = towers.Tower()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.01,
    }
    optimizer = torch.optim.ASGD(net.parameters(), lr=1.0, lambd=0.0)
    e = deepfast.initialize(model=net, optimizer=optimizer, config=config)[0]
    twin = engine(0)
    step_of(e, 0), step_of(twin, 0)
    assert e.get_global_grad_norm() == pytest.approx(twin.get_global_grad_norm(), rel=1e-5)
    before = towers.Tower()
    moved = [towers.whole(p).float() - before.get_parameter(n) for n, p in zip(e._names(), e._params(), strict=True)]
    assert float(torch.nn.utils.get_total_norm([t.detach() for t in moved])) == pytest.approx(0.01, rel=1e-4)


def check_states_and_optimizers():
    for optimizer, options in (
        ("LAMB", {}),
        ("AdamW", {"state_dtype": "bf16"}),
        ("Adam", {"state_dtype": "int8"}),
        ("Adagrad", {}),
    ):
        (a, *_), (b, *_) = both(precision="fp16", optimizer=optimizer, config={"gradient_clipping": 0.5}, **options)
        compare(kept(b), kept(a), 0.1 if "int8" in options.values() else CLOSE["fp16"])  # groups of its own


class Sharded(nn.Module):
    """What the caller has sharded already."""

    def __init__(self, mesh, **policy):
        super().__init__()
        tower = towers.Tower()
        tower.scale = nn.Parameter(tower.scale.detach()[None])
        tower.empty = None
        for block in tower.blocks:
            torch.distributed.fsdp.fully_shard(block, mesh=mesh, **policy)
        tower.transposed = nn.Parameter(tower.transposed.detach().contiguous())
        self.tower = torch.distributed.fsdp.fully_shard(tower, mesh=mesh, **policy)

    def forward(self, ids, both=True):
        return self.tower(ids, True)


def check_sharded_by_the_caller():
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    hsdp = dist.init_device_mesh("cpu", (2, SIZE // 2), mesh_dim_names=("replicate", "shard"))
    for mesh, stage in ((dist.init_device_mesh("cpu", (SIZE,)), 3), (hsdp, 0)):

        class Alone(nn.Module):
            def __init__(self):
                super().__init__()
                self.tower = towers.Tower()
                self.tower.scale = nn.Parameter(self.tower.scale.detach()[None])
                self.tower.empty = None

            def forward(self, ids, both=True):
                return self.tower(ids, True)

        for precision, options in (("fp32", {}), ("bf16", {"mp_policy": policy})):
            one = functools.partial(Sharded, mesh, **options)
            a = engine(0, precision, 2, net=Alone, config={"gradient_clipping": 0.5})
            b = engine(stage, precision, 2, net=one, config={"gradient_clipping": 0.5})
            for step in range(3):
                step_of(a, step), step_of(b, step)
            compare(kept(b), kept(a), CLOSE[precision])
    then = kept(b)
    b.save_checkpoint(Path(sys.argv[1], "by_caller"))
    step_of(b, 3)
    after, other = kept(b), engine(stage, precision, 2, net=one, config={"gradient_clipping": 0.5})
    other.load_checkpoint(Path(sys.argv[1], "by_caller"))
    compare(kept(other), then, EXACT)
    step_of(other, 3)
    compare(kept(other), after, EXACT)
    b.backward(loss_of(b, 0, RANK))
    with pytest.raises(RuntimeError, match="fully_shard averages"):
        b.backward(loss_of(b, 0, RANK), weight=2.0)
    with pytest.raises(deepfast.errors.ConfigError, match="stage=2: fully_shard has cut"):
        engine(2, net=one)


def check_dtensors_of_others_are_refused():
    def net():
        module = nn.Sequential(nn.Linear(4, 4))
        mesh = dist.init_device_mesh("cpu", (SIZE,))
        torch.distributed.tensor.parallel.parallelize_module(
            module, mesh, {"0": torch.distributed.tensor.parallel.ColwiseParallel()}
        )
        return module

    with pytest.raises(deepfast.errors.ConfigError, match=r"'0\.weight' is a DTensor already: call fully_shard"):
        engine(3, net=net)


CHECKS = {name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    stage3_ranks.main(CHECKS)
