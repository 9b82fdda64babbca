"""A disc in the plane, learnt in NumPy with gradients by hand: deepfast steps the arrays where they lie."""

import numpy as np

import deepfast

rng = np.random.default_rng(0)
x = np.stack([*rng.uniform(-1, 1, (2, 2000)), np.ones(2000)])
inside = np.hypot(x[0], x[1]) < 0.8
params = {"w": rng.normal(size=(32, 3)), "v": rng.normal(size=32) / 6}
optimizer = deepfast.functional.Optimizer(deepfast.AdamW, lr=0.03, max_grad_norm=1.0)
state = optimizer.init(params)
for step in range(301):
    hidden = np.maximum(params["w"] @ x, 0)
    guess = 1 / (1 + np.exp(-params["v"] @ hidden))
    error = (guess - inside) / 2000
    grads = {"w": np.outer(params["v"], error) * (hidden > 0) @ x.T, "v": hidden @ error}
    optimizer.update_(grads, state, params)
    if step % 100 == 0:
        print(f"step {step} accuracy {np.mean((guess > 0.5) == inside):.3f}")
