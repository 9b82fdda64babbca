"""All that users call, as they call it: `mypy --strict` has nothing to say, and knows what comes back. Never run."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from typing_extensions import assert_type

import deepfast
import deepfast.deepspeed as deepspeed
from deepfast import comm, optim
from deepfast.engine import Engine
from deepfast.errors import ConfigError, LossScaleError, PeerTimeout, TrainingError, UserError

Form = Literal["fp32", "bf16", "param", "int8"]

model = nn.Linear(4, 2)
adamw = deepfast.AdamW(model.parameters(), lr=1e-3, master="split", state_dtype={"exp_avg": "bf16"}, max_grad_norm=1.0)
adam = deepfast.Adam(list(model.named_parameters()), betas=(0.9, 0.95), amsgrad=True, backend="cpu", reset_grad=True)
sgd = deepfast.SGD([{"params": list(model.parameters()), "lr": 0.1}], lr=torch.tensor(0.1), momentum=0.9)
lion = deepfast.Lion(model.parameters(), master="none", rounding="stochastic", seed=1)
lamb = deepfast.LAMB(model.parameters(), phi=(0.0, 10.0), state_dtype="int8")
adagrad = optim.Adagrad(model.parameters(), initial_accumulator_value=0.1)
several: list[optim.Optimizer] = [adamw, adam, sgd, lion, lamb, adagrad]
again = type(adamw)(adamw.param_groups, **adamw.defaults)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=10)
handle = deepfast.step_in_backward(sgd)
handle.remove()
scaler = deepfast.LossScaler("cpu", init_scale=2.0**10, hysteresis=2, max_scale=None)


def train(x: Tensor) -> float:
    loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    for scaled in scaler.scale((loss, loss)):
        scaled.backward()
    scaler.unscale_(adamw)
    scaler.step(adamw)
    scaler.update()
    schedule.step()
    adamw.zero_grad()
    norm = adamw.grad_norm
    return float("nan") if norm is None else norm.item()


def closure() -> Tensor:
    total: Tensor = model(torch.ones(1, 4)).sum()
    return total


assert_type(adamw, deepfast.AdamW)
assert_type(adamw.step(), None)
assert_type(adamw.step(closure), Tensor)
assert_type(adamw.grad_norm, Tensor | None)
assert_type(adamw.master, Literal["auto", "split", "fp32", "none"])
assert_type(adamw.state_dtype, Form | dict[str, Form])
assert_type(adamw.max_grad_norm, float | None)
assert_type(adamw.backend, Literal["auto", "cpu", "cuda", "triton", "reference"])
assert_type(adamw.get_master(model.weight), Tensor)
assert_type(adamw.state_dict(compact=True), dict[str, Any])
assert_type(scaler.scale(torch.ones(())), Tensor)
assert_type(scaler.scale([torch.ones(())]), list[Tensor])
assert_type(scaler.step(adamw), float | None)
assert_type(scaler.get_scale(), float)
assert_type(scaler.found_inf(adamw), Tensor | None)
assert_type(deepfast.__version__, str)
adamw.master = "fp32"
adamw.max_grad_norm = None
adamw.set_master(model.weight, torch.ones(2, 4))
adamw.refresh_master()
adamw.init_state()
adamw.load_state_dict(adamw.state_dict())
scaler.load_state_dict(scaler.state_dict())

device = deepfast.init_distributed()
assert_type(device, torch.device)
parser = deepfast.add_config_arguments(argparse.ArgumentParser())
assert_type(parser, argparse.ArgumentParser)
config: dict[str, Any] = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
engine, optimizer, loader, scheduler = deepfast.initialize(model=model, config=config, training_data=[1, 2])
assert_type(engine, Engine)
assert_type(optimizer, torch.optim.Optimizer | None)
assert_type(loader, DataLoader[Any] | None)
assert_type(scheduler, LRScheduler | None)
deepfast.initialize(None, model, config=Path("ds_config.json"), optimizer=deepfast.AdamW)
deepfast.initialize(model=model, config="ds_config.json", optimizer=adamw, lr_scheduler=schedule)
deepfast.initialize(
    model=model,
    config="ds_config.json",
    optimizer=lambda params: deepfast.AdamW(params, lr=1e-3),
    lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10),
    model_parameters=model.parameters(),
)
loss = engine(torch.ones(2, 4)).sum()
assert_type(engine.backward(loss), Tensor)
assert_type(engine.backward(loss, 3.0, retain_graph=True), Tensor)
assert_type(engine.scale(loss), Tensor)
assert_type(engine.step(), None)
assert_type(engine.get_lr(), list[float])
assert_type(engine.get_global_grad_norm(), float | None)
scale: float = engine.loss_scale
assert_type(engine.global_steps, int)
assert_type(engine.module, nn.Module)
assert_type(engine.optimizer, torch.optim.Optimizer | None)
assert_type(engine.lr_scheduler, LRScheduler | None)
assert_type(engine.scaler, deepfast.LossScaler)
assert_type(engine.device, torch.device)
assert_type(engine.dtype, torch.dtype)
assert_type(engine.config, dict[str, Any])
assert_type(engine.train_batch_size(), int)
assert_type(engine.was_step_applied(), bool)
assert_type(engine.is_gradient_accumulation_boundary(), bool)
assert_type(engine.save_checkpoint("out", tag="a", client_state={"epoch": 1}, wait=False, keep=2), Path)
assert_type(engine.load_checkpoint(Path("out")), tuple[str | None, dict[str, Any] | None])
assert_type(engine.deepspeed_io([1, 2, 3]), DataLoader[Any])
assert_type(engine.module_state_dict(), dict[str, Tensor])
assert_type(engine.data_parallel_group, ProcessGroup | None)
assert_type(engine.get_batch_info(), tuple[int, int, int])
assert_type(engine.skipped_steps, int)
assert_type(engine.get_wall_clock_timers(), dict[str, float])
assert_type(engine.monitor.enabled, bool)
engine.zero_grad()
engine.wait_for_checkpoint()
engine.set_train_batch_size(8)
engine.destroy()
with engine.no_sync():
    engine.backward(loss)


def use(e: Engine) -> None:
    e.module.eval()


comm.register_backend()
with comm.Communicator(timeout=timedelta(seconds=30)) as c:
    t = torch.ones(4)
    assert_type(c.all_reduce_(t, "avg", scale=0.5), Tensor)
    assert_type(c.all_reduce(t), Tensor)
    assert_type(c.reduce_scatter(t, t), Tensor)
    assert_type(c.all_gather(t, t), Tensor)
    assert_type(c.empty(4, torch.bfloat16), Tensor)
    assert_type(c.rank, int)
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(c, comm.allreduce_hook)
    c.check()
adamw.distinct_over(init_device_mesh("cpu", (1,)), [model.weight])

try:
    engine.step()
except LossScaleError as error:
    assert_type(error.parameters, tuple[str, ...])
except (ConfigError, TrainingError, UserError):
    pass
except PeerTimeout as silent:
    assert_type(silent.ranks, tuple[int, ...])
assert_type(deepfast.comm.PeerTimeout, type[PeerTimeout])

assert_type(deepspeed.initialize(model=model, config=config)[0], Engine)
deepspeed.init_distributed()
