"""Which borrower defaults? Numbers and categories, a tenth of the numbers missing, and few defaults."""

import argparse
from pathlib import Path

import torch
from torch import nn

import deepfast


def borrowers(count, seed):
    """Age, income, debts, late payments (in spreads from the average), purpose, region: [count, 24]. Who defaults."""
    g = torch.Generator().manual_seed(seed)
    numbers, categories = torch.randn(count, 4, generator=g), torch.randint(8, (count, 2), generator=g)
    (age, income, debts, late), (purpose, region) = numbers.T, categories.T
    odds = 1.5 * debts * (age < 0) + late.exp() - income + 1.5 * (purpose == 3) + torch.sin(2.0 * region) - 6
    numbers = numbers.where(torch.rand(count, 4, generator=g) > 0.1, torch.nan)  # then 0, and 1 in another column
    columns = [numbers.nan_to_num(0.0), numbers.isnan(), torch.eye(8)[categories].flatten(1)]
    return torch.cat(columns, 1).to(device), torch.bernoulli(odds.sigmoid(), generator=g).to(device)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--checkpoint", type=Path, help="a file to go on from, where it is there, and to save to")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
net = [nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)]
model = nn.Sequential(*net).to(device)
optimizer = deepfast.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
scaler = deepfast.LossScaler(device)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "schedule": schedule}
if args.checkpoint and args.checkpoint.exists():
    for name, state in torch.load(args.checkpoint).items():
        parts[name].load_state_dict(state)
x, default = borrowers(100_000, seed=0)
for step in range(schedule.last_epoch, schedule.last_epoch + args.steps):
    with torch.autocast(device, torch.float16):
        logits = model(x[step % 100 :: 100])
    loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), default[step % 100 :: 100])
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.6f}")
if args.checkpoint:
    torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint)
x, default = borrowers(50_000, seed=1)
risk, order = model(x).detach().sigmoid().sort()
bad = default[order].double()
auc = ((1 - bad).cumsum(0) * bad).sum() / ((1 - bad).sum() * bad.sum())
print(f"held-out: AUC {auc:.3f}, {bad.mean():.1%} default")
print(f"of the riskiest tenth {bad[-5000:].mean():.1%} default, {risk[-5000:].mean():.1%} were expected to")
