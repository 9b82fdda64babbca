"""Backward passes: what engine.backward takes and returns, loss.backward() itself, losses over several engines."""

from __future__ import annotations

import copy

import pytest
import torch
from engines import CONFIG, batches, engine, equal, model, state, train
from torch import nn

import deepfast

mse = nn.functional.mse_loss
ONE = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}}}


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.0)


def norm(module: nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item()


def close(a, b, tolerance=1e-5):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.float(), q.float(), rtol=tolerance, atol=tolerance)


def test_two_losses_of_one_graph():
    e, plain = engine(ONE), model()
    optimizer = adamw(plain)
    x, y = batches(1)[0]
    out = plain(x)
    mse(out, y).backward(retain_graph=True)
    out.abs().mean().backward()
    optimizer.step()
    out = e(x)
    e.backward(mse(out, y), retain_graph=True)
    e.backward(out.abs().mean())
    e.step()
    close(e.module.parameters(), plain.parameters())


def test_what_backward_returns_and_refuses():
    e = engine()
    x, y = batches(1)[0]
    loss = mse(e(x), y)
    given = e.backward(loss)
    assert given.item() == pytest.approx(loss.item() / 4)
    assert not given.requires_grad
    assert e.backward(mse(e(x), y), scale_wrt_gas=False).item() == pytest.approx(loss.item())
    with pytest.raises(TypeError, match="retain_graph= is a keyword"):
        e.backward(mse(e(x), y), True)
    with pytest.raises(ValueError, match="scale_wrt_gas=False"):
        e.backward(mse(e(x), y), 2.0, scale_wrt_gas=False)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_loss_that_is_divided_already(kind):
    divided, usual = engine(PRECISIONS[kind]), engine(PRECISIONS[kind])
    data = batches(8)
    train(usual, data)
    for x, y in data:
        divided.backward(mse(divided(x).to(y.dtype), y) / 4, scale_wrt_gas=False)
        divided.step()
    close(divided.module.parameters(), usual.module.parameters(), 1e-6 if kind == "fp32" else 1e-2)
    assert divided.get_global_grad_norm() == pytest.approx(usual.get_global_grad_norm(), rel=1e-2)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", PRECISIONS)
def test_loss_backward_itself(kind, accumulation):
    """The bits that engine.backward gives; under fp16 a loss has to be scaled first."""
    config = {**PRECISIONS[kind], "train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    asked, itself = engine(config), engine(config)
    data = batches(8)
    train(asked, data)
    for x, y in data:
        loss = mse(itself(x).to(y.dtype), y)
        if kind == "fp16":
            with pytest.raises(RuntimeError, match=r"engine.scale\(loss\).backward\(\)"):
                loss.backward(retain_graph=True)
            loss = itself.scale(loss)
        loss.backward()
        itself.step()
    assert itself.global_steps == 8 // accumulation
    assert equal(state(asked), state(itself))
    assert asked.get_global_grad_norm() == itself.get_global_grad_norm()


def test_a_pass_that_nobody_could_notice():
    """Through the module itself: its gradients are there when step() is called."""
    asked, e = engine(), engine()
    data = batches(8)
    train(asked, data)
    for x, y in data:
        mse(e.module(x), y).backward()
        e.step()
    assert equal(state(asked), state(e))
    e = engine({**ONE, **PRECISIONS["fp16"]})
    mse(e.module(data[0][0]), data[0][1]).backward()
    with pytest.raises(RuntimeError, match="under fp16 a loss is scaled"):
        e.step()


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_gradients_of_inputs_are_no_micro_batch(kind):
    """A gradient penalty: torch.autograd.grad through the engine's outputs."""
    e, plain = engine({**ONE, **PRECISIONS[kind]}), model()
    optimizer = adamw(plain)
    for run in (e, plain):
        x = batches(1)[0][0].clone().requires_grad_()
        out = run(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = out.square().mean() + slope.square().mean()
        if run is plain:
            loss.backward()
            optimizer.step()
        else:
            assert e._gradients.count == 0
            e.backward(loss)
            e.step()
    close(e.module.parameters(), plain.parameters(), 1e-5 if kind == "fp32" else 1e-2)
    assert e.get_global_grad_norm() == pytest.approx(norm(plain), rel=1e-2)


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_loss_over_two_engines(kind, accumulation):
    """An encoder and a head: the loss is the head's, and both step; their loss scales differ."""
    config = {**PRECISIONS[kind], "train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    encoder, head = nn.Linear(6, 6), model()
    twins = copy.deepcopy((encoder, head))
    first, *_ = deepfast.initialize(model=encoder, config={**CONFIG, **config})
    if kind == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 9}
    second, *_ = deepfast.initialize(model=head, config={**CONFIG, **config})
    if kind != "fp32":
        for twin in twins:
            for p in twin.parameters():
                p.data = p.data.to(first.dtype).float()
    optimizer = adamw(nn.ModuleList(twins))
    for i, (x, y) in enumerate(batches(4)):
        second.backward(mse(second(first(x)).float(), y))
        second.step()
        first.step()
        (mse(twins[1](twins[0](x)), y) / accumulation).backward()
        if (i + 1) % accumulation == 0:
            for e, twin in zip((first, second), twins, strict=True):  # unscaled, by the right scale
                assert e.get_global_grad_norm() == pytest.approx(norm(twin), rel=1e-4 if kind == "fp32" else 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert first.global_steps == second.global_steps == 4 // accumulation
    for e, twin in zip((first, second), twins, strict=True):
        close(e.module.parameters(), twin.parameters(), 1e-5 if kind == "fp32" else 4e-2)
        assert e.was_step_applied()


def test_a_weight_counts_in_all_engines_that_a_loss_has_come_through():
    first, second = (deepfast.initialize(model=m, config=CONFIG)[0] for m in (nn.Linear(6, 6), model()))
    twins = copy.deepcopy((first.module, second.module))
    data, weights = batches(4), [1.0, 5.0, 2.0, 4.0]
    for (x, y), weight in zip(data, weights, strict=True):
        second.backward(mse(second(first(x)), y), weight)
        second.step()
        first.step()
        (mse(twins[1](twins[0](x)), y) * weight / sum(weights)).backward()
    for e, twin in zip((first, second), twins, strict=True):
        assert e.global_steps == 1
        assert e.get_global_grad_norm() == pytest.approx(norm(twin), rel=1e-4)


def test_what_another_engines_loss_has_left_comes_under_this_ones_scale():
    """A discriminator that does not drop it adds it to its own, as torch does, whatever the two scales."""
    config = {**CONFIG, **ONE}
    generator, *_ = deepfast.initialize(
        model=model(), config={**config, "fp16": {"enabled": True, "initial_scale_power": 9}}
    )
    discriminator, *_ = deepfast.initialize(model=nn.Linear(3, 1), config={**config, **PRECISIONS["fp16"]})
    twins = [copy.deepcopy(e.module).float() for e in (generator, discriminator)]
    x, y = batches(1)[0]
    generator.backward(discriminator(generator(x)).square().mean())
    generator.step()
    discriminator.backward(discriminator(y).square().mean())
    discriminator.step()
    twins[1](twins[0](x)).square().mean().backward()
    assert generator.get_global_grad_norm() == pytest.approx(norm(twins[0]), rel=0.02)
    twins[1](y).square().mean().backward()
    assert discriminator.get_global_grad_norm() == pytest.approx(norm(twins[1]), rel=0.02)


def test_engines_of_one_loss_need_one_precision():
    first, second = engine(ONE), engine({**ONE, **PRECISIONS["fp16"]})
    x = torch.ones(2, 6)
    out = second(torch.cat([first(x), first(x)], 1))
    with pytest.raises(RuntimeError, match="need the same precision"):
        second.backward(out.sum())


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dropped", ["engine", "module"])
def test_a_generators_loss_goes_through_its_discriminator(kind, accumulation, dropped):
    """What it leaves there is dropped by zero_grad(), and is no micro-batch of the discriminator's."""
    config = {**PRECISIONS[kind], "train_batch_size": 4 * accumulation, "gradient_accumulation_steps": accumulation}
    g, _, d = model(), None, nn.Linear(3, 1)
    twins = copy.deepcopy((g, d))
    generator, *_ = deepfast.initialize(model=g, config={**CONFIG, **config})
    discriminator, *_ = deepfast.initialize(model=d, config={**CONFIG, **config})
    if kind != "fp32":
        for twin in twins:
            for p in twin.parameters():
                p.data = p.data.to(generator.dtype).float()
    optimizers = [adamw(twin) for twin in twins]
    bce = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(4, 1), torch.zeros(4, 1)
    for x, y in batches(3, size=4 * accumulation):
        pairs = list(zip(x.split(4), y.split(4), strict=True))
        (discriminator if dropped == "engine" else d).zero_grad()
        optimizers[1].zero_grad()
        for noise, image in pairs:
            discriminator.backward(bce(discriminator(image).float(), real))
            discriminator.backward(bce(discriminator(generator(noise).detach()).float(), fake))
            discriminator.step()
            loss = bce(twins[1](image), real) + bce(twins[1](twins[0](noise).detach()), fake)
            (loss / accumulation).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        for noise, _ in pairs:
            generator.backward(bce(discriminator(generator(noise)).float(), real))
            generator.step()
            (bce(twins[1](twins[0](noise)), real) / accumulation).backward()
        optimizers[0].step()
    for e, twin in zip((generator, discriminator), twins, strict=True):
        assert e.global_steps == 3
        close(e.module.parameters(), twin.parameters(), 1e-5 if kind == "fp32" else 4e-2)


def test_the_boundary_can_be_said():
    """Several passes and one step(), as DeepSpeed documents it; and an epoch's last, incomplete step."""
    counted, said = engine(), engine()
    data = batches(4)
    train(counted, data)
    for i, (x, y) in enumerate(data):
        said.set_gradient_accumulation_boundary(i == 3)
        said.backward(mse(said(x), y))
    said.step()
    assert equal(state(counted), state(said))
    said.set_gradient_accumulation_boundary(None)
    assert not said.is_gradient_accumulation_boundary()
    train(said, data[:1])
    assert said.global_steps == 1
    said.set_gradient_accumulation_boundary(True)
    train(said, data[1:2])
    assert said.global_steps == 2


@pytest.mark.parametrize("kind", PRECISIONS)
def test_the_batch_size_can_change(kind):
    """More micro-batches than at first, where nothing was summed; also for a step that has begun."""
    e, fixed = engine({**ONE, **PRECISIONS[kind]}), engine(PRECISIONS[kind])
    data = batches(4)
    x, y = data[0]
    e.backward(mse(e(x).to(y.dtype), y))
    e.set_train_batch_size(8)
    assert (e.gradient_accumulation_steps(), e.get_batch_info()) == (4, (8, 2, 4))
    e.step()
    train(e, data[1:])
    train(fixed, data)
    assert e.global_steps == 1
    close(e.module.parameters(), fixed.module.parameters(), 1e-6 if kind == "fp32" else 2e-2)
    assert e.get_global_grad_norm() == pytest.approx(fixed.get_global_grad_norm(), rel=2e-2)
    e.set_train_batch_size(2)
    train(e, data)
    assert e.global_steps == 5
    e.set_train_micro_batch_size(3)
    assert e.get_batch_info() == (3, 3, 1)
    with pytest.raises(ValueError, match="multiple of micro-batch x ranks = 3"):
        e.set_train_batch_size(4)
    with pytest.raises(ValueError, match="must be positive"):
        e.set_train_micro_batch_size(0)


def test_zero_grad_in_the_middle_of_a_step_is_said(caplog):
    e = engine()
    data = batches(4)
    e.zero_grad()
    train(e, data[:1])
    assert not caplog.records
    for _ in range(2):
        e.zero_grad()
        train(e, data[1:2])
    assert caplog.text.count("the gradients of 1 of its 4 micro-batches are dropped") == 1
    train(e, data[3:])
    assert e.global_steps == 1


def test_an_engine_without_an_optimizer_runs_forward(tmp_path):
    trained = engine({"bf16": True})
    train(trained, batches(4))
    trained.save_checkpoint(tmp_path)
    config = {"train_batch_size": 2, "bf16": {"enabled": True}}
    e, optimizer, _, scheduler = deepfast.initialize(model=model(3), config=config)
    assert optimizer is scheduler is None
    assert e(torch.ones(2, 6)).dtype == torch.bfloat16
    for call in (lambda: e.backward(e(torch.ones(2, 6)).sum()), e.step, e.get_lr):
        with pytest.raises(RuntimeError, match="only runs forward: pass optimizer="):
            call()
    e.load_checkpoint(tmp_path, load_module_only=True)
    assert equal(state(e), state(trained))
    e.save_checkpoint(tmp_path / "again")
    again, *_ = deepfast.initialize(model=model(4), config=config)
    again.load_checkpoint(tmp_path / "again")
    assert equal(state(again), state(trained))
    with pytest.raises(deepfast.engine.checkpoint.CheckpointError, match="saved without an optimizer"):
        trained.load_checkpoint(tmp_path / "again")
