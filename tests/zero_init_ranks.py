"""Run by test_zero_init.py on four ranks: models made in parts, each against one that was made whole."""

from __future__ import annotations

import copy
import datetime
import io
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from zero_init_models import Fails, Net, Odd, Own, Wide

import deepfast
from deepfast.deepspeed import zero
from deepfast.engine import born

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def made(kind=Net, seed=0, **options):
    """In parts; each rank draws other numbers."""
    torch.manual_seed(seed + RANK)
    with zero.Init(**options):
        return kind()


def whole(kind=Net, seed=0):
    torch.manual_seed(seed)
    return kind()


def same(net, plain):
    """Gathers net; to the bit."""
    with zero.GatheredParameters(net.parameters()):
        for (name, p), (other, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
            assert name == other
            assert type(p) is type(q) is nn.Parameter, name
            assert (p.shape, p.dtype, p.device, p.stride()) == (q.shape, q.dtype, q.device, q.stride())
            assert torch.equal(p, q), name
            assert p.requires_grad == q.requires_grad
    for (_, b), (name, c) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
        assert b.device == CPU
        assert torch.equal(b, c), name


def check_the_bits_of_one_made_whole():
    plain = whole()
    after = torch.rand(3)
    torch.manual_seed(0)
    with zero.Init():
        net = Net()
    assert torch.equal(after, torch.rand(3)), "as many random numbers"
    assert born.is_born(net.bias)
    assert (net.mean, net.listed) == (plain.mean, plain.listed)
    assert (net.scaled == plain.scaled).all()
    assert torch.equal(net.seen, plain.seen)
    assert net.head.weight is net.wte.weight
    same(net, plain)
    other = made()  # each rank draws other numbers
    assert (other.mean, other.listed) == (plain.mean, plain.listed)
    same(other, plain)


def check_each_rank_has_its_rows():
    plain, net = whole(), made()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        if q.ndim:
            assert isinstance(p, nn.Parameter)
            assert (p.shape, p.dtype, p.ds_shape, p.ds_numel) == (q.shape, q.dtype, q.shape, q.numel())
            assert p.ds_status is zero.ZeroParamStatus.NOT_AVAILABLE
            assert p.device.type == "meta"
            rows = list(q.chunk(4)) + [q[:0]] * 4
            assert torch.equal(born.shard_of(p), rows[RANK])
    assert len({p.ds_id for p in net.parameters() if p.ndim}) == sum(p.ndim > 0 for p in plain.parameters())
    assert born.any_in(net)
    assert not born.any_in(plain)
    with pytest.raises(ValueError, match=r"shape \(7, 10\) was not made within zero.Init"):
        born.shard_of(plain.wte.weight)


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive, of all that operations have made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                storage = t.untyped_storage()
                if storage._cdata not in self.known and storage.nbytes():
                    self.known[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage._cdata)
        return result

    def forget(self, key):
        self.now -= self.known.pop(key)


def check_no_rank_holds_more_than_a_few_weights():
    with Memory() as memory:
        plain = whole(Wide)
    assert memory.peak >= 16 << 20
    with Memory() as memory:
        net = made(Wide)
    held = sum(born.shard_of(p).untyped_storage().nbytes() for p in net.parameters())
    assert held < 4.1 * 2**20
    for _ in range(20 * HANGS):  # gloo's threads let go of a tensor some time after its sum
        if memory.now <= held + 4096:
            break
        time.sleep(0.05)
    assert memory.now <= held + 4096
    assert memory.peak < held + 5 * 2**20, f"{memory.peak / 2**20} MiB"
    same(net, plain)


def check_what_is_not_cut_is_whole():
    net = made(Odd)
    assert not born.any_in(net)
    assert (type(net.own_kind), net.elsewhere.is_meta, net.turned.stride()) == (Own, True, (1, 5))
    torch.manual_seed(RANK)
    plain = Odd()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert p.is_meta or torch.equal(p, q)
    with zero.Init():
        lazy = nn.LazyLinear(3)
    assert isinstance(lazy.weight, nn.UninitializedParameter)


def check_outside_of_a_context_no_value_is_used_by_mistake():
    net = made()
    p = net.blocks[0].fc.weight
    before = born.shard_of(p).clone()
    uses = [
        lambda: nn.init.normal_(p),
        p.data.zero_,
        lambda: p.data[1:].t().fill_(1),
        lambda: p.detach().mul_(2),
        lambda: p.sum().item(),
        lambda: p + 1,
        lambda: p.detach().clone(),
        lambda: net(IDS),
        lambda: p.detach().numpy(),
        p.tolist,
        lambda: torch.save(net.state_dict(), io.BytesIO()),
        lambda: torch.zeros(p.shape).copy_(p.detach()),
        lambda: p.data.copy_(torch.zeros(1)),
        lambda: p.data[1:].copy_(torch.zeros(19, 10)),
        lambda: p.data.copy_(net.blocks[1].fc.weight.data),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="lies in parts over the ranks: enter") as caught:
            use()
        assert len(str(caught.value)) <= 200
    assert torch.equal(born.shard_of(p), before)
    assert p.data[1:].shape == (19, 10)  # shapes are no values
    assert torch.empty_like(p).shape == torch.zeros_like(p).shape == p.shape
    assert "size=(20, 10)" in repr(p)
    other = copy.deepcopy(net)
    same(other, whole())
    assert other.head.weight is other.wte.weight
    assert other.wte.weight.ds_id != net.wte.weight.ds_id
    with zero.GatheredParameters(other.parameters(), modifier_rank=0):
        other.blocks[0].fc.weight.data.zero_()
    assert torch.equal(born.shard_of(p), before)


def check_a_state_dict_is_loaded():
    plain, net = whole(seed=3), made()
    net.load_state_dict(plain.state_dict())
    same(net, plain)
    other = made()
    other.load_state_dict(plain.state_dict(), assign=True)
    assert not born.any_in(other)


def check_a_module_is_moved_and_cast():
    net = made().to("cpu").double()
    assert net.head.weight is net.wte.weight
    assert net.bias.dtype == born.shard_of(net.bias).dtype == torch.float64
    same(net, whole().double())
    with zero.Init():
        torch.manual_seed(0)
        inside = Net().double()
    same(inside, whole().double())


def check_an_error_leaves_the_classes_as_they_were():
    constructors = {kind: vars(kind).get("__init__") for kind in (nn.Linear, Net, Fails, nn.Module)}
    for kind, error in ((Fails, KeyError), (lambda: 1 / 0, ZeroDivisionError)):
        with pytest.raises(error), zero.Init(), zero.Init():
            kind()
        assert {kind: vars(kind).get("__init__") for kind in constructors} == constructors
        assert "__init_subclass__" not in vars(nn.Module)
        assert _get_current_dispatch_mode() is None
        assert type(nn.Linear(8, 8).weight) is nn.Parameter
        assert not born.is_born(nn.Linear(8, 8).weight)
    with zero.Init():
        with pytest.raises(KeyError):
            Fails()
        assert born.is_born(nn.Linear(8, 8).weight), "the next one is made as ever"


def check_contexts():
    with zero.Init():
        with zero.Init():
            inner = nn.Linear(8, 8)
        outer = nn.Linear(8, 8)

        class Late(nn.Linear):
            def __init__(self):
                super().__init__(8, 8)
                self.first = born.is_born(self.weight)

        late = Late()
        replaced = nn.Linear(8, 8)
        replaced.weight = nn.Parameter(torch.ones(8, 8))
        assert not born.is_born(replaced.weight)
    assert born.any_in(inner)
    assert born.any_in(outer)
    assert (late.first, born.any_in(late)) == (False, True), "when its own constructor is done"
    assert born.is_born(replaced.weight)
    assert not born.any_in(made(enabled=False))
    assert not born.any_in(made(config_dict_or_path={"zero_optimization": {"stage": 2}}))
    assert not born.any_in(made(config={"train_batch_size": 4}))
    assert born.any_in(made(config={"train_batch_size": 4, "zero_optimization": {"stage": 3}}))
    assert born.any_in(made(remote_device="cpu", dtype=torch.float16, data_parallel_group=dist.group.WORLD))
    plain = whole(seed=RANK)
    zero.Init(module=plain)
    same(plain, whole())
    pair = dist.new_group([0, 1]), dist.new_group([2, 3])
    with pytest.raises(ValueError, match="over all ranks"):
        zero.Init(data_parallel_group=pair[RANK // 2])


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.lstm = nn.LSTM(8, 8)
        with torch.no_grad():
            self.out = self.encoder(torch.ones(1, 4, 8)).sum()


def check_torchs_own_modules():
    net, plain = made(Normed), whole(Normed)
    assert torch.equal(net.out, plain.out)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        with zero.GatheredParameters(p):
            assert torch.equal(p, q)


def check_transformers_models():
    import transformers

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=12, vocab_size=31, n_positions=16)
    plain = whole(lambda: transformers.AutoModelForCausalLM.from_config(config))
    net = made(lambda: transformers.AutoModelForCausalLM.from_config(config))
    assert born.is_born(net.transformer.wte.weight)
    assert net.lm_head.weight is net.transformer.wte.weight
    same(net, plain)
    if RANK == 0:
        plain.save_pretrained(PLACE / "pretrained")
    dist.barrier()
    net = made(lambda: transformers.AutoModelForCausalLM.from_pretrained(PLACE / "pretrained"), seed=7)
    assert born.is_born(net.transformer.wte.weight)
    same(net, plain)


def sharded(module):
    mesh = dist.init_device_mesh("cpu", (4,))
    ignored = {p for p in module.parameters() if not p.ndim}
    for unit in (*module.blocks, module):
        fully_shard(unit, mesh=mesh, ignored_params=ignored)
    return module


def settled(net):
    before = dict(net.named_parameters())
    sharded(net)
    after = dict(net.named_parameters())
    parts = {name: p for name, p in after.items() if p is not before[name]}
    born.settle(net, {before[name]: p for name, p in parts.items()}, CPU)
    assert all(dict(net.named_parameters())[name] is p for name, p in after.items())
    return net


def check_fully_shard_gets_its_rows():
    net, plain = settled(made().float()), sharded(whole().float())
    losses = []
    for module in (net, plain):
        optimizer = deepfast.AdamW(module.parameters(), lr=0.01)
        kept = [p for p in module.parameters() if isinstance(p, DTensor)]
        rows = [p._local_tensor for p in kept]
        for _ in range(3):
            loss = module(IDS).square().mean() + module.last(torch.ones(10)).sum()
            loss = loss + module.bias.sum() + module.precise.sum()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
        losses.append(loss.detach().item())
        assert all(p._local_tensor.data_ptr() == row.data_ptr() for p, row in zip(kept, rows, strict=True))
    assert losses[0] == losses[1]
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        if isinstance(q, DTensor):
            assert p._local_tensor.stride() == q._local_tensor.stride()
            assert hasattr(p, "ds_id")
            p, q = p._local_tensor, q._local_tensor
        assert torch.equal(p, q)


def check_a_module_is_made_whole():
    net, plain = made(), whole()
    born.make_whole(net, CPU)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert type(p) is nn.Parameter
        assert torch.equal(p, q)
        assert not hasattr(p, "ds_id")
    assert net.head.weight is net.wte.weight


def check_an_engine_trains_what_was_made_in_parts(stage, fp16):
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    config |= {"zero_optimization": {"stage": stage}, "fp16": {"enabled": fp16}}
    ends = []
    for net in (made(), whole()):
        engine = deepfast.initialize(model=net, config=config)[0]
        for _ in range(3):
            loss = engine(IDS).float().square().mean()
            engine.backward(loss), engine.step()
        with zero.GatheredParameters(net.parameters()):
            ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], whole().wte.weight), "it has learnt"


CHECKS = {name.removeprefix("check_"): check for name, check in vars().items() if name.startswith("check_")}
for stage, fp16 in ((0, False), (2, False), (3, False), (3, True)):
    CHECKS[f"an engine of stage {stage}{', fp16' * fp16}"] = lambda s=stage, f=fp16: (
        check_an_engine_trains_what_was_made_in_parts(s, f)
    )
del CHECKS["an_engine_trains_what_was_made_in_parts"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    RANK, PLACE = dist.get_rank(), Path(sys.argv[1])
    run_checks(CHECKS, PLACE / f"{RANK}.json", dist.barrier)
    dist.destroy_process_group()
