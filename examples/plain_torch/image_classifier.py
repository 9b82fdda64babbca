"""Which road sign is it? A small convolutional net, channels last, in bf16; the pictures are drawn here."""

import argparse
import math

import torch
from torch import nn

# How many corners, and how far the first is turned, in degrees.
SIGNS = {"warning": (3, 90), "yield": (3, 30), "information": (4, 45), "priority": (4, 0), "stop": (8, 22.5)}


def pictures(count, like):
    """Of any colours, in noise, off the centre, tilted, near or far: [count, 3, 32, 32]; and which sign: [count]."""
    sign = torch.randint(len(SIGNS), (count,))
    corners, turn = torch.tensor(list(SIGNS.values())).T[:, sign, None, None]
    right, up, tilt, size = torch.rand(4, count, 1, 1)
    x, y = torch.linspace(-1, 1, 32) + right / 2 - 0.25, torch.linspace(1, -1, 32)[:, None] + up / 2 - 0.25
    half = math.pi / corners
    angle = torch.atan2(y, x) - torch.deg2rad(turn + 20 * tilt - 10)
    away = x.hypot(y) * torch.cos(angle.remainder(2 * half) - half)  # from the centre, towards the middle of a side
    inside = (away < (0.4 + 0.4 * size) * torch.cos(half))[:, None]
    dark, bright = torch.rand(2, count, 3, 1, 1) / 2
    picture = torch.where(inside, bright + 0.5, dark) + torch.randn(count, 3, 32, 32) / 8 - 0.5
    return picture.to(like, memory_format=torch.channels_last), sign.to(like.device)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
layers = []
for channels, more in ((3, 16), (16, 32), (32, 64)):
    layers += [nn.Conv2d(channels, more, 3, stride=2, padding=1), nn.GroupNorm(4, more), nn.ReLU()]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, len(SIGNS))).to(memory_format=torch.channels_last)
model.to(device).forward = torch.autocast(device, torch.bfloat16)(model.forward)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps + 1)
for step in range(args.steps):
    x, sign = pictures(128, model[0].weight)
    loss = nn.functional.cross_entropy(model(x).float(), sign)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 10 == 0:
        print(f"step {step} loss {loss.item():.4f}")
x, sign = pictures(2000, model[0].weight)
print(f"held-out: accuracy {(model(x).argmax(1) == sign).float().mean():.3f}")
