"""Lightning, Fabric, accelerate and Trainer: torch's default optimizer is replaced, and nothing else changes."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from cases import OURS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import deepfast

pytestmark = pytest.mark.xdist_group("frameworks")
CLIPPED = [(None, None), (0.1, "norm"), (0.1, "value")]
OPTIONS = {"SGD": {"lr": 0.01, "momentum": 0.9}, "AdamW": {"lr": 0.05, "eps": 1e-3}}
CLASSES = {"deepfast": lambda name: OURS[name], "torch": lambda name: getattr(torch.optim, name)}
SCALERS = {
    "GradScaler": lambda: torch.amp.GradScaler("cpu", init_scale=2.0**10),
    "LossScaler": lambda: deepfast.LossScaler("cpu", 2.0**10),
}
BATCHES = 8
OVERFLOWS = (2, 5)  # the batches whose gradients are infinite


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """What the frameworks log; and none of them asks the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("pytorch_lightning", "lightning_fabric", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """Its loss is infinite for a batch that says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x, labels):
        loss = (self.layers(x[:, :10]) - labels).square().mean() * 10
        return {"loss": loss * x[0, 10]}


def data(overflows=OVERFLOWS):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(4 * BATCHES, 11, generator=g), torch.randn(4 * BATCHES, 1, generator=g)
    x[:, 10] = 1.0
    for batch in overflows:
        x[4 * batch : 4 * batch + 4, 10] = float("inf")
    return TensorDataset(x, y)


def loader(overflows=OVERFLOWS):
    return DataLoader(data(overflows), batch_size=4)


def make(net, cls, name):
    optimizer = CLASSES[cls](name)(net.parameters(), **OPTIONS[name])
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def same(ours, theirs, tolerance=1e-5):
    """The pairs of weights and of whatever else was noted; and training has moved the weights, to finite values."""
    for p, q, start in zip(ours[0], theirs[0], Net().parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        assert p.isfinite().all()
        assert not torch.equal(p, start)
    assert ours[1:] == theirs[1:]


def of_lightning(cls, name, precision, clip=None, algorithm=None, scaler=None, manual=False):
    import pytorch_lightning as pl
    from pytorch_lightning.plugins import MixedPrecision

    seen = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = Net(), not manual

        def configure_optimizers(self):
            optimizer, schedule = make(self.net, cls, name)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def training_step(self, batch, _):
            loss = self.net(*batch)["loss"]
            if manual:
                wrapped = self.optimizers()
                wrapped.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(wrapped)
                scaler.update()
                seen.append(scaler.get_scale())
            return loss

    module, by_plugin = Module(), precision == "16-mixed"
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, gradient_clip_val=clip, gradient_clip_algorithm=algorithm, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **({"plugins": MixedPrecision(precision, "cpu", scaler)} if by_plugin else {"precision": precision}),
    )  # fmt: skip
    trainer.fit(module, loader(OVERFLOWS if scaler else ()))
    return list(module.net.parameters()), seen or trainer.global_step


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("clip", "algorithm"), CLIPPED)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, clip, algorithm, name):
    same(*(of_lightning(cls, name, precision, clip, algorithm) for cls in CLASSES))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("clip", "algorithm"), CLIPPED)
@pytest.mark.parametrize("scaler", SCALERS)
def test_lightning_in_fp16(scaler, clip, algorithm, name):
    ours = of_lightning("deepfast", name, "16-mixed", clip, algorithm, SCALERS[scaler]())
    same(ours, of_lightning("torch", name, "16-mixed", clip, algorithm, SCALERS["GradScaler"]()))


@pytest.mark.parametrize("scaler", SCALERS)
def test_lightnings_wrapper_is_given_to_a_scaler(scaler):
    ours = of_lightning("deepfast", "SGD", "32-true", scaler=SCALERS[scaler](), manual=True)
    same(ours, of_lightning("torch", "SGD", "32-true", scaler=SCALERS["GradScaler"](), manual=True))
    assert ours[1][-1] == 2.0**10 / 2 ** (2 * len(OVERFLOWS))


def of_fabric(cls, name, scaler, clip=None, by_plugin=True):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler) if by_plugin else None)
    fabric.launch()
    net, scales = Net(), []
    model, optimizer = fabric.setup(net, make(net, cls, name)[0])
    for batch in loader():
        optimizer.zero_grad()
        loss = model(*batch)["loss"]
        if by_plugin:
            fabric.backward(loss)
            if clip:
                fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    return list(net.parameters()), scales


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("clip", "by_plugin"), [(None, True), (0.1, True), (None, False)])
@pytest.mark.parametrize("scaler", SCALERS)
def test_fabric(scaler, clip, by_plugin, name):
    ours = of_fabric("deepfast", name, SCALERS[scaler](), clip, by_plugin)
    same(ours, of_fabric("torch", name, SCALERS["GradScaler"](), clip, by_plugin))
    assert ours[1][-1] == 2.0**10 / 2 ** len(OVERFLOWS)


def test_the_norm_is_read_through_fabrics_wrapper():
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", precision="bf16-true")
    net = Net()
    model, optimizer = fabric.setup(net, deepfast.AdamW(net.parameters(), max_grad_norm=1.0))
    fabric.backward(model(*next(iter(loader())))["loss"])
    optimizer.step()
    assert optimizer.grad_norm == optimizer.optimizer.grad_norm > 0


def of_accelerate(cls, name, scaler, scheduled):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler  # as with mixed_precision="fp16", which it allows on a GPU only
    net, seen = Net(), []
    optimizer, schedule = make(net, cls, name)
    prepared = accelerator.prepare(net, optimizer, loader(OVERFLOWS if scaler else ()), schedule)
    model, optimizer, batches, schedule = prepared
    for batch in batches:
        optimizer.zero_grad()
        accelerator.backward(model(*batch)["loss"])
        optimizer.step()
        if scheduled:
            schedule.step()
            seen.append((optimizer.step_was_skipped, optimizer.param_groups[0]["lr"]))
    return list(net.parameters()), seen


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scaler", [None, "GradScaler", "LossScaler"])
def test_accelerate(scaler, name):
    """It takes a step that was called for one that was made; LossScaler always calls it: no schedule there."""
    runs = []
    for cls, made in (("deepfast", scaler), ("torch", scaler and "GradScaler")):
        runs.append(of_accelerate(cls, name, made and SCALERS[made](), scheduled=scaler != "LossScaler"))
    same(*runs)
    if scaler == "GradScaler":
        assert [i for i, (skipped, _) in enumerate(runs[0][1]) if skipped] == list(OVERFLOWS)


def of_trainer(cls, name, scaler, clip, folder, scheduled):
    from transformers import Trainer, TrainingArguments

    net = Net()
    optimizer, schedule = make(net, cls, name)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no", max_grad_norm=clip, seed=1, remove_unused_columns=False,
    )  # fmt: skip

    def collate(rows):
        x, y = zip(*rows, strict=True)
        return {"x": torch.stack(x), "labels": torch.stack(y)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return None

    if not scheduled:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    train_dataset = data(OVERFLOWS if scaler else ())
    trainer = InOrder(
        net, arguments, train_dataset=train_dataset, data_collator=collate, optimizers=(optimizer, schedule)
    )
    trainer.accelerator.scaler = scaler
    trainer.train()
    return list(net.parameters()), optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scaler", [None, "GradScaler", "LossScaler"])
def test_trainer(scaler, name, tmp_path):
    clip, scheduled = (0.0 if scaler else 1.0), scaler != "LossScaler"
    ours = of_trainer("deepfast", name, scaler and SCALERS[scaler](), clip, tmp_path, scheduled)
    same(ours, of_trainer("torch", name, scaler and SCALERS["GradScaler"](), clip, tmp_path, scheduled))
    assert ours[1] == pytest.approx(OPTIONS[name]["lr"] * 0.9 ** {None: 16, "GradScaler": 12, "LossScaler": 0}[scaler])
