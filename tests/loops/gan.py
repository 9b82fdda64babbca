"""A DCGAN on random pictures, two engines: what public scripts do, `import deepspeed` unchanged."""

import argparse
import json

import deepspeed
import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=3)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

deepspeed.init_distributed()
torch.manual_seed(0)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
            nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise):
        return self.main(noise)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 1, 4, 1, 0, bias=False),
        )

    def forward(self, pictures):
        return torch.sigmoid(self.main(pictures).float()).view(-1)


net_d, net_g = Discriminator(), Generator()
optimizers = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (net_d, net_g)]
model_d, optimizer_d, _, _ = deepspeed.initialize(
    args=args, model=net_d, model_parameters=net_d.parameters(), optimizer=optimizers[0]
)
model_g, optimizer_g, _, _ = deepspeed.initialize(
    args=args, model=net_g, model_parameters=net_g.parameters(), optimizer=optimizers[1]
)
criterion = nn.BCELoss()
g = torch.Generator().manual_seed(1 + deepspeed.comm.get_rank())
size = model_d.train_micro_batch_size_per_gpu()
losses = []
for _ in range(args.steps):
    real = torch.randn(size, 3, 8, 8, generator=g).to(model_d.device)
    noise = torch.randn(size, 8, 1, 1, generator=g).to(model_d.device)
    net_d.zero_grad()
    error_real = criterion(model_d(real), torch.ones(size))
    model_d.backward(error_real)
    fake = model_g(noise)
    error_fake = criterion(model_d(fake.detach()), torch.zeros(size))
    model_d.backward(error_fake)
    model_d.step()
    net_g.zero_grad()
    error_g = criterion(model_d(fake), torch.ones(size))
    model_g.backward(error_g)
    model_g.step()
    losses.append([error_real.item() + error_fake.item(), error_g.item()])
if deepspeed.comm.get_rank() == 0:
    sums = [sum(p.double().abs().sum().item() for p in net.parameters()) for net in (net_d, net_g)]
    print(json.dumps({"losses": losses, "weights": sums, "steps": [model_d.global_steps, model_g.global_steps]}))
