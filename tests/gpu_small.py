"""Every kernel once or twice on small tensors, to be run under compute-sanitizer: python tests/gpu_small.py cuda"""

import sys

import torch
from cases import EVERY, OURS, VARIANTS

import deepfast
from deepfast import ops

device, backend = torch.device("cuda", 0), sys.argv[1]
SIZES = (1, 0, 7, 1023, 1025, 4097, 9001)

for name, variant in EVERY:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        params = [torch.nn.Parameter(torch.ones(n + i % 3, dtype=dtype, device=device)[i % 3 :]) for i, n in
                  enumerate(SIZES)]  # fmt: skip
        optimizer = OURS[name](params, max_grad_norm=1.0, reset_grad=True, backend=backend, **VARIANTS[name][variant])
        scaler = deepfast.LossScaler(device, init_scale=8.0)
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            scaler.step(optimizer)
            scaler.update()

many = [torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(700)]
for p in many:
    p.grad = torch.ones_like(p)
deepfast.LAMB(many, max_grad_norm=1.0, backend=backend).step()
found = ops.select(backend, device, torch.float32)
sums = [torch.zeros(n, device=device) for n in SIZES]
found.accumulate_(sums, [torch.ones(n, dtype=torch.float16, device=device) for n in SIZES], 0.5, True)
torch.cuda.synchronize()
print("every kernel ran")
