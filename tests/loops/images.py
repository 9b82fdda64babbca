"""An image classifier with epochs, a loader that the engine makes, evaluation and StepLR once an epoch."""

import argparse
import json

import deepspeed
import torch
from deepspeed.utils import log_dist
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1, help="local rank passed from the distributed launcher")
parser.add_argument("--dtype", default="fp32", choices=["fp16", "bf16", "fp32"])
parser.add_argument("--stage", type=int, default=0)
parser.add_argument("--log-interval", type=int, default=4)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
deepspeed.init_distributed()
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 6, 3), nn.MaxPool2d(2, 2), nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8 * 2 * 2, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.fc(torch.flatten(self.pool(x), 1))


g = torch.Generator().manual_seed(1)
labels = torch.randint(4, (64,), generator=g)
pictures = torch.randn(64, 3, 14, 14, generator=g) + labels[:, None, None, None].float()
data = torch.utils.data.TensorDataset(pictures, labels)
net = Net()
trainable = filter(lambda p: p.requires_grad, net.parameters())
ds_config = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 10, "warmup_type": "linear"},
    },
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "bf16": {"enabled": args.dtype == "bf16"},
    "fp16": {"enabled": args.dtype == "fp16", "fp16_master_weights_and_grads": False, "loss_scale": 0,
             "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15},
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": args.stage,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 50000000,
        "reduce_bucket_size": 50000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
}  # fmt: skip
engine, optimizer, loader, _ = deepspeed.initialize(
    args=args, model=net, model_parameters=trainable, training_data=data, config=ds_config
)
target_dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.half if engine.fp16_enabled() else None
criterion = nn.CrossEntropyLoss()
losses = []
for epoch in range(10):
    for i, (inputs, targets) in enumerate(loader):
        inputs, targets = (
            inputs.to(engine.local_rank if torch.cuda.is_available() else "cpu"),
            targets.to(engine.device),
        )
        if target_dtype is not None:
            inputs = inputs.to(target_dtype)
        loss = criterion(engine(inputs).float(), targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if i % args.log_interval == args.log_interval - 1:
            log_dist(f"epoch {epoch}: loss {losses[-1]:.3f}", ranks=[0])
with torch.no_grad():
    right = (engine(pictures.to(target_dtype or torch.float32)).argmax(-1) == labels).float().mean().item()
if torch.distributed.get_rank() == 0:
    print(json.dumps({"first": losses[0], "last": losses[-1], "right": right, "steps": engine.global_steps}))
