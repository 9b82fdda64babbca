"""A sine wave, learnt in JAX with gradients by jax.jit: deepfast makes the new arrays."""

import jax
import jax.numpy as jnp

import deepfast


def loss(params, x):
    return jnp.mean((jnp.tanh(x * params["w"] + params["b"]) @ params["v"] - jnp.sin(x[:, 0])) ** 2)


x = jnp.linspace(-4, 4, 256)[:, None]
params = dict(zip("wbv", jax.random.normal(jax.random.key(0), (3, 64)) / 2, strict=True))
optimizer = deepfast.functional.Optimizer(deepfast.AdamW, lr=1e-2, max_grad_norm=1.0)
state = optimizer.init(params)
gradient = jax.jit(jax.value_and_grad(loss))
for step in range(301):
    value, grads = gradient(params, x)
    params, state = optimizer.update(grads, state, params)
    if step % 100 == 0:
        print(f"step {step} loss {value:.5f}")
