"""Run by test_fully_shard.py under torchrun on two ranks: trains, saves by torch.distributed.checkpoint, and is killed.

Arguments: a folder, and "once" if the second rank is to be killed in the first of its lives.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from beside_whole import batch, gathered, net, sharded_backward
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import deepfast

STEPS, SAVED = 8, 2  # how many there are, and after how many it saves
DIES = 5  # steps are there by then, one more than are saved


class Training:
    """What a checkpoint holds of a run, as torch.distributed.checkpoint wants it told."""

    def __init__(self) -> None:
        self.model = net(torch.bfloat16)
        for layer in (self.model[0], self.model[2], self.model):
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        self.optimizer = deepfast.AdamW(self.model.parameters(), lr=0.01, max_grad_norm=0.5)
        self.scaler = deepfast.LossScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.step = 0

    def state_dict(self):
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "scaler": self.scaler.state_dict(), "step": self.step}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def main(folder: Path, dies: bool) -> None:
    run = Training()
    rank, size = dist.get_rank(), dist.get_world_size()
    there = sorted(folder.glob("step*/.metadata"), key=lambda f: int(f.parent.name.removeprefix("step")))
    if there:
        dcp.load({"training": run}, checkpoint_id=there[-1].parent)
    if rank == 0:
        print(f"begins at step {run.step}", flush=True)
    while run.step < STEPS:
        run.optimizer.zero_grad()
        sharded_backward(run.model, batch(run.step), rank, size, run.scaler.scale)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.step += 1
        if dies and rank == 1 and run.step == DIES and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.step % SAVED == 0:
            dcp.save({"training": run}, checkpoint_id=folder / f"step{run.step}")
    whole = [gathered(p) for p in run.model.parameters()]
    masters = [gathered(run.optimizer.get_master(p)) for p in run.model.parameters()]
    if rank == 0:
        torch.save([*whole, *masters, torch.tensor(run.scaler.get_scale())], folder / "weights.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepfast.init_distributed("gloo")  # looks past the ranks of the life before, whose addresses torchrun keeps
    main(Path(sys.argv[1]), sys.argv[2] == "once")
    dist.destroy_process_group()
