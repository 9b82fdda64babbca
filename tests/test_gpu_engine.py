"""On a GPU: the engine, alone and sharded over two processes that share one. Run by ``make gpu``.

Gradients are exact (zero_ranks.Exact) where bits are compared: a GPU's are then a CPU's.
"""

from __future__ import annotations

import os

import pytest
import torch
from checks import failures, heard_of_pair
from gpu_engine_ranks import checks
from torch import nn
from zero_ranks import DTYPES, Exact, Net, kept, run, same, train

import deepfast

pytestmark = pytest.mark.gpu
BACKENDS = ["cuda", "triton"]
PLAYED = os.environ.get("DEEPFAST_PLAYED")  # no GPU: a rehearsal, on the CPU (tools/gpu_played.py)
DEVICE = torch.device("cpu") if PLAYED else torch.device("cuda", 0)
# Triton compiles each kernel for the types that it gets, when it is first launched.
HOWS = [("cuda", 1), ("cuda", 3), ("triton", 3)]
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 9, "hysteresis": 1, "loss_scale_window": 2}}
SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}}
STEPS = 5
TIMEOUT = 900 if PLAYED else 70  # seconds: less than the stage has, so that it is told how far they came


def overflows(step, nth):
    return float("inf") if step in (1, 3) and nth == 0 else 1.0


@pytest.fixture
def on(monkeypatch):
    """An engine on the GPU with that backend's kernels, or on the CPU with its own."""
    if not PLAYED:
        torch.cuda.set_device(0)

    def on(backend, config, accumulation, net=Exact, **options):
        if backend == "cpu":
            monkeypatch.delenv("DEEPFAST_BACKEND", raising=False)
            return run(config, 0, accumulation, steps=0, net=net, dist_init_required=False, **options)
        monkeypatch.setenv("DEEPFAST_BACKEND", backend)
        engine = run(config, 0, accumulation, steps=0, net=net, **options)
        assert {p.device for p in engine.module.parameters()} == {DEVICE}
        return engine

    return on


def trained(on, backend, *how, steps=range(STEPS), spoil=None, **options):
    """What an engine keeps after each step."""
    engine = on(backend, *how, **options)
    seen = []
    for step in steps:
        train(engine, step, 1, spoil)
        seen.append({**kept(engine), "lr": torch.tensor(engine.get_lr())})
    return seen


@pytest.mark.parametrize(("backend", "accumulation"), HOWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["AdamW", "LAMB", "SGD"])
def test_an_engine_gives_the_bits_of_a_cpu(optimizer, dtype, accumulation, backend, on):
    config = {**(FP16 if dtype == "fp16" else DTYPES[dtype]), **SCHEDULE, "gradient_clipping": 0.5}
    options = {"optimizer": optimizer, "spoil": overflows if dtype == "fp16" else None}
    gpu, cpu = (trained(on, where, config, accumulation, **options) for where in (backend, "cpu"))
    for one, other in zip(gpu, cpu, strict=True):
        same(one, other)
    assert gpu[-1]["skipped"] == (2 if dtype == "fp16" else 0)
    assert not torch.equal(gpu[-1]["wide.weight"], gpu[0]["wide.weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_losses_in_one_step(backend, on):
    """Of 16 bits, the first one's gradients are taken over into sums."""
    seen = []
    for where in (backend, "cpu"):
        engine = on(where, DTYPES["bf16"], 1)
        for half in (True, False):
            ids = torch.arange(28).view(4, 7).to(engine.device) + half
            engine.backward(engine.module.loss(engine(ids, half), ids))
        engine.step()
        seen.append(kept(engine))
    same(*seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_net_learns_as_with_plain_torch(backend, on):
    """With matrices and an embedding: the same kernels of torch's on both sides, memory that lies elsewhere; SGD, for a
    difference in a gradient's rounding to be no more than that in a weight."""
    engine = on(backend, {}, 2, net=Net, optimizer="SGD", arguments={"lr": 0.03, "dampening": 0})
    plain = Net().to(DEVICE)
    optimizer, first = torch.optim.SGD(plain.parameters(), lr=0.03, momentum=0.9), 0.0
    for step in range(10):
        losses = []
        for net, backward in ((engine, engine.backward), (plain, lambda loss: (loss / 2).backward())):
            for k in range(2):
                torch.manual_seed(10 * step + k)
                ids = torch.randint(97, (4, 7)).to(DEVICE)
                backward(loss := plain.loss(net(ids, k == 0), ids))
                losses.append(loss.item())
                if net is engine:
                    engine.step()
        optimizer.step()
        optimizer.zero_grad()
        first = first or losses[0]
        assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)
    assert losses[0] < 3 < first
    for p, q in zip(engine.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_net_of_16_bits_learns(dtype, backend, on):
    engine = on(backend, DTYPES[dtype], 1, net=Net)
    ids = torch.arange(28).view(4, 7).to(engine.device)
    losses = []
    for _ in range(20):
        engine.backward(loss := engine.module.loss(engine(ids, True).float(), ids))
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("saver", "reader"), [("gpu", "gpu"), ("gpu", "cpu"), ("cpu", "gpu")])
def test_a_checkpoint_goes_on_to_the_bit_wherever_it_is_read(saver, reader, backend, on, tmp_path):
    config, where = {**FP16, **SCHEDULE, "gradient_clipping": 0.5}, {"gpu": backend, "cpu": "cpu"}
    engine = on(where[saver], config, 2)
    for step in (0, 1):
        train(engine, step, 1, overflows)
    engine.save_checkpoint(tmp_path, client_state={"so": "far"}, wait=False)
    train(engine, 2, 1)  # while it is written
    after = kept(engine)
    engine.wait_for_checkpoint()
    again = on(where[reader], config, 2)
    assert again.load_checkpoint(tmp_path)[1] == {"so": "far"}
    train(again, 2, 1)
    same(kept(again), after)
    assert again.get_lr() == engine.get_lr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sharded_engine_of_two_processes(backend, on, tmp_path):
    """Stages 0, 1 and 2 on one GPU; and what both have saved goes on in one process."""
    said = heard_of_pair(tmp_path, "gpu_engine_ranks.py", backend, *played_by(), ends=0, timeout=TIMEOUT)
    assert said[0].keys() == checks(backend, few=bool(PLAYED) or backend == "triton").keys()
    wrong = [text for check in said[0] if (text := failures(said, check))]
    assert not wrong, "\n".join(wrong)
    for name, where in (("AdamW", backend), ("AdamW", "cpu"), ("SGD", backend)):
        engine = on(where, {**DTYPES["fp16"], "gradient_clipping": 0.5}, 2, optimizer=name)
        assert engine.load_checkpoint(tmp_path / name)[1] == {"so": "far"}
        train(engine, 2, 1)
        same(kept(engine), torch.load(tmp_path / f"{name}.pt"))


def played_by() -> list[str]:
    return [f"{PLAYED}/backend/on_host.so"] if PLAYED else []


@pytest.mark.parametrize("backend", BACKENDS)
def test_ours_takes_the_place_of_torchs(backend, on, monkeypatch):
    """A script that hands over torch's optimizer trains with the kernels, and to the same bits."""
    monkeypatch.setenv("DEEPFAST_BACKEND", backend)
    net = Exact()
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0, **DTYPES["bf16"]}
    engine, optimizer, *_ = deepfast.initialize(
        model=net, optimizer=torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1), config=config
    )
    assert type(optimizer) is deepfast.AdamW
    ours = on(backend, DTYPES["bf16"], 1, arguments={"amsgrad": False})
    for one in (engine, ours):
        train(one, 0, 1)
    same(kept(engine), kept(ours))
    assert all(isinstance(p, nn.Parameter) and p.device == DEVICE for p in net.parameters())
