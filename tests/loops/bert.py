"""Fine-tuning a (tiny, fresh) BERT for classification: groups without decay, a client schedule, evaluation, a save."""

import argparse
import json
import os

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import logger
from transformers import BertConfig, BertForSequenceClassification, get_scheduler

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--offload", action="store_true")
parser.add_argument("--gradient_checkpointing", action="store_true")
parser.add_argument("--output", default="")
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

if args.local_rank == -1:
    device = torch.device(get_accelerator().device_name())
else:
    get_accelerator().set_device(args.local_rank)
    device = torch.device(get_accelerator().device_name(), args.local_rank)
    deepspeed.init_distributed()
torch.manual_seed(0)
config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                    max_position_embeddings=32, num_labels=2, hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0)  # fmt: skip
model = BertForSequenceClassification(config)
no_decay = ("bias", "LayerNorm.weight")
groups = [
    {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.01},
    {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
]
optimizer = (DeepSpeedCPUAdam if args.offload else FusedAdam)(groups, lr=5e-3, betas=(0.9, 0.95))
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=30)
engine, optimizer, _, scheduler = deepspeed.initialize(
    args=args, model=model, optimizer=optimizer, lr_scheduler=scheduler, dist_init_required=True
)
if args.gradient_checkpointing:
    engine.gradient_checkpointing_enable()
logger.info("micro-batch %d", engine.train_micro_batch_size_per_gpu())
world, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
g = torch.Generator().manual_seed(1)
size = engine.train_micro_batch_size_per_gpu()
engine.train()
losses = []
for _ in range(12):
    ids = torch.randint(2, 64, (size * world, 12), generator=g)
    labels = (ids[:, 0] > 32).long()  # what is to be learnt
    own = slice(rank * size, (rank + 1) * size)
    batch = {"input_ids": ids[own].to(engine.device), "labels": labels[own].to(engine.device)}
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.detach())
    engine.tput_timer.update_epoch_count()
engine.eval()
mean = torch.stack(losses).mean(0)
deepspeed.comm.all_reduce(mean)
with torch.no_grad():
    right = (engine(input_ids=ids.to(engine.device)).logits.argmax(-1).cpu() == labels).float().mean().item()
if rank == 0 and args.output:
    engine.save_pretrained(args.output)  # the module's
    assert os.path.isfile(os.path.join(args.output, "model.safetensors"))
deepspeed.comm.barrier()
if rank == 0:
    print(json.dumps({"losses": [float(np.mean(x.item())) for x in losses], "right": right, "lr": engine.get_lr(),
                      "norm": engine.get_global_grad_norm()}))  # fmt: skip
engine.destroy()
