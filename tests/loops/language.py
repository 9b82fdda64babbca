"""A small language model: accumulation, checkpoints with client_state, resume, weights as one fp32 file in the end."""

import argparse
import json
import os

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "-1")))
parser.add_argument("--checkpoints", required=True)
parser.add_argument("--iterations", type=int, default=8)
parser.add_argument("--stop_after", type=int, default=0)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
torch.manual_seed(1337 + deepspeed.comm.get_rank())


class Model(nn.Module):
    def __init__(self, vocabulary=32, width=16):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(8, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, targets):
        hidden = self.block(self.embed(ids) + self.positions)
        logits = self.head(hidden)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


engine, _, _, _ = deepspeed.initialize(args=args, model=(model := Model()), model_parameters=model.parameters())
start = 0
path, client_state = engine.load_checkpoint(args.checkpoints)
if client_state is not None:
    start = client_state["iteration"]
    assert client_state["args"].iterations == args.iterations
micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
losses = []
for iteration in range(start, args.iterations):
    g = torch.Generator().manual_seed(iteration)
    total = 0.0
    for i in range(accumulation):
        ids = torch.randint(32, (micro * world, 9), generator=g)[rank * micro : (rank + 1) * micro].to(engine.device)
        _, loss = engine(ids[:, :-1], ids[:, 1:])
        total += engine.backward(loss).item()  # divided by the accumulation
        assert engine.is_gradient_accumulation_boundary() == (i == accumulation - 1)
        engine.step()
    losses.append(total)
    state = {"iteration": iteration + 1, "args": args, "best": torch.tensor(min(losses))}
    engine.save_checkpoint(args.checkpoints, tag=f"iter{iteration + 1}", client_state=state)
    if iteration + 1 == args.stop_after:
        break
deepspeed.comm.barrier()
if rank == 0:
    weights = get_fp32_state_dict_from_zero_checkpoint(args.checkpoints)
    print(json.dumps({"losses": losses, "scale": engine.loss_scale(), "skipped": engine.skipped_steps,
                      "weights": {name: t.double().sum().item() for name, t in weights.items()},
                      "lr": engine.get_lr()}))  # fmt: skip
