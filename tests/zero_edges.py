"""Run by test_zero.py on two ranks: what else happens to a sharded engine, on one host or, with "hosts", on two."""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zero_ranks
from checks import run_checks
from conftest import HANGS
from torch import nn
from zero_ranks import DTYPES, RANK, SIZE, Net, kept, run, same, same_everywhere, train

import deepfast
from deepfast.errors import ConfigError

HOSTS = "hosts" in sys.argv[2:]  # each rank is told that it is on a host of its own


def same_or_close(a, b):
    """Between hosts gloo adds, in an order of its own, and norms are added up by parts."""
    if not HOSTS:
        same(a, b)
    assert a.keys() == b.keys()
    for name in a:
        same_everywhere(a[name])
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def check_all_optimizers_and_types():
    for config, accumulation, options in zero_ranks.CASES.values():
        if options.get("optimizer") == "Lion":  # the sign of what is nearly zero
            continue
        found = [kept(run(config, stage, accumulation, **options)) for stage in (0, 1, 2)]
        for other in found[1:]:
            same_or_close(other, found[0])


def check_no_sync_and_weights():
    """Against plain torch, which has the micro-batches of all ranks."""

    def loss_of(net, step, k, rank):
        torch.manual_seed(100 * step + 10 * k + rank)
        ids = torch.randint(97, (4, 7)).to(engines[0].device)
        return plain.loss(net(ids, (k + rank) % 2 == 0), ids)

    rounds = ((False, True, False), (True, True, False), (True, False, True))  # which micro-batches are in no_sync
    engines = [
        run({}, stage, 3, steps=0, optimizer="SGD", arguments={"lr": 0.5, "dampening": 0}) for stage in (0, 1, 2)
    ]
    plain = Net().to(engines[0].device)
    torchs = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    for step, kinds in enumerate(rounds):
        torchs.zero_grad()
        share = 1 / sum(1.0 + rank + k for rank in range(SIZE) for k in range(3))
        for k, rank in itertools.product(range(3), range(SIZE)):
            (loss_of(plain, step, k, rank) * (1.0 + rank + k) * share).backward()
        torchs.step()
        for engine in engines:
            for k, alone in enumerate(kinds):
                with engine.no_sync() if alone else contextlib.nullcontext():
                    engine.backward(loss_of(engine, step, k, RANK), weight=1.0 + RANK + k)
                engine.step()
            for p, q in zip(engine.module.parameters(), plain.parameters(), strict=True):
                same_everywhere(p)
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def check_groups_added_later():
    class Grown(Net):
        def __init__(self):
            super().__init__()
            self.later = nn.Linear(30, 30)
            self.wants = False

        def forward(self, ids, both):
            x = super().forward(ids, both)
            return x + self.later(self.embedding(ids)) @ self.embedding.weight.t() if self.wants else x

    def trained(stage):
        engine = deepfast.initialize(
            model=(net := Grown()),
            optimizer=deepfast.AdamW([p for n, p in net.named_parameters() if not n.startswith("later")], lr=0.01),
            config={"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, **DTYPES["fp16"],
                    "zero_optimization": {"stage": stage}, "gradient_clipping": 0},
        )[0]  # fmt: skip
        train(engine, 0, SIZE)
        with torch.no_grad():
            net.later.weight += RANK  # the first rank's holds
        engine.optimizer.add_param_group({"params": list(net.later.parameters()), "lr": 0.5})
        net.wants = True
        for step in (1, 2):
            train(engine, step, SIZE)
        if stage:
            assert all(part.sharded for part in engine._parts())
        assert not torch.equal(net.later.weight, Grown().later.weight.half())
        return kept(engine)

    found = [trained(stage) for stage in (0, 1, 2)]
    for other in found[1:]:
        same_or_close(other, found[0])


def check_weights_written_from_outside():
    def trained(stage):
        engine = run(DTYPES["bf16"], stage, 1, steps=1)
        with torch.no_grad():
            engine.module.wide.weight.clamp_(-0.05, 0.05)
            engine.module.tall.weight.data = engine.module.tall.weight.data * 0.5
        engine.module.norm.load_state_dict({"weight": torch.full((17,), 3.0), "bias": torch.ones(17)})
        train(engine, 1, SIZE)
        assert engine.module.wide.weight.abs().max() < 0.08
        return kept(engine)

    found = [trained(stage) for stage in (0, 1, 2)]
    for other in found[1:]:
        same_or_close(other, found[0])


def check_a_parameter_that_has_become_another():
    engine = run({}, 2, 1, steps=1)
    engine.module.never.data = engine.module.never.data.double()
    with pytest.raises(RuntimeError, match="has become one of shape"):
        train(engine, 1, SIZE)


def check_what_backward_still_needs_is_not_overwritten():
    """A graph of before the step would take the weights of after it, which other ranks have written."""
    engine = run({}, 2, 1, steps=1)
    torch.manual_seed(RANK)
    out = engine(torch.randint(97, (4, 7)).to(engine.device), True)
    train(engine, 1, SIZE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def check_an_optimizer_that_has_stepped():
    def trained(stage):
        net = Net()
        optimizer = deepfast.AdamW(net.parameters(), lr=0.01)
        torch.manual_seed(1)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "gradient_clipping": 0}
        engine = deepfast.initialize(model=net, optimizer=optimizer, config=config)[0]
        train(engine, 0, SIZE)
        return kept(engine)

    found = [trained(stage) for stage in (0, 1, 2)]
    assert found[0]["wide.weight.step"] == 2
    for other in found[1:]:
        same_or_close(other, found[0])


def check_who_steps():
    options = {"config": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}}
    net = Net()
    engine, optimizer, *_ = deepfast.initialize(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), **options
    )
    assert type(optimizer) is deepfast.SGD
    train(engine, 0, SIZE)
    with pytest.raises(ConfigError, match="RMSprop cannot be sharded"):
        deepfast.initialize(model=net, optimizer=torch.optim.RMSprop(net.parameters()), **options)


def check_plain_torch_steps_parts():
    def trained(backend):
        engine = run(DTYPES["bf16"], 2, 1, steps=0, optimizer="LAMB")
        engine.optimizer.backend = backend
        train(engine, 0, SIZE)
        return kept(engine)

    plain, ours = trained("reference"), trained("auto")
    for name, value in plain.items():
        same_everywhere(value)
        torch.testing.assert_close(value.float(), ours[name].float(), rtol=1e-2, atol=1e-5)


def check_each_weight_is_a_tensor_of_its_own():
    engine = run(DTYPES["bf16"], 1, 1, steps=1)
    file = io.BytesIO()
    torch.save(engine.module.norm.state_dict(), file)
    assert file.tell() < 8000
    places = {p.untyped_storage().data_ptr() for p in engine.module.parameters() if p.numel()}
    assert len(places) == sum(p.numel() > 0 for p in engine.module.parameters())


def check_late_gradients_and_sparse_ones():
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4))
    engine = deepfast.initialize(
        model=net, optimizer=lambda p: deepfast.SGD(p, lr=0.1), config={"train_micro_batch_size_per_gpu": 1}
    )[0]
    with pytest.raises(RuntimeError, match="sparse"):
        engine.backward(engine(torch.tensor([1])).sum())


CHECKS = {name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")}
ON_HOSTS = ("all_optimizers_and_types", "no_sync_and_weights", "groups_added_later", "weights_written_from_outside",
            "an_optimizer_that_has_stepped", "plain_torch_steps_parts")  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    if HOSTS:
        os.environ["DEEPFAST_HOST_ID"] = f"host {RANK}"
        CHECKS = {name: CHECKS[name] for name in ON_HOSTS}
    else:
        CHECKS.pop("all_optimizers_and_types")  # zero_ranks.py's
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS))
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
