"""Text that the model writes, so that one sees what it has learned."""

from __future__ import annotations

from typing import Any

import torch

from deepfast.engine.config import Config
from deepfast.train import gpt2


class Sampler:
    """Made and called by all ranks; rank 0 writes.

    Args:
        tokenizer: None: tokens are written as numbers.
        sequences: with whose ``head`` the text begins, where the configuration says nothing else.
    """

    def __init__(self, config: Config, engine: Any, tokenizer: Any, sequences: Any) -> None:
        self._config, self._engine, self._tokenizer = config, engine, tokenizer
        self._last: tuple[int, str] | None = None  # after which step, and what
        if engine.rank != 0 or not config.sample_tokens:
            return
        ids = sequences.head
        if config.sample_prompt:
            ids = tokenizer(config.sample_prompt, add_special_tokens=False)["input_ids"]
        room = engine.module.config.n_positions - 1
        self._prompt = torch.as_tensor(ids[-room:], dtype=torch.int64, device=engine.device)

    def __call__(self, module: Any = None) -> str | None:
        """What the model writes now; the same random numbers each time, none of training's. None on other ranks than 0.

        Args:
            module: whole, on rank 0; None: the engine's, of which at stage 3 all ranks bring the parts together.
        """
        engine = self._engine
        weights = None
        if module is None and engine.zero_optimization_partition_weights():
            weights = engine.consolidated()
        if engine.rank != 0:
            return None
        if self._last is None or self._last[0] != engine.global_steps:
            if module is None:
                module = engine.module if weights is None else gpt2.with_weights(engine.module.config, weights)
            ids = gpt2.sample(module, self._prompt, self._config.sample_tokens, self._config.seed)
            text = " ".join(map(str, ids)) if self._tokenizer is None else self._tokenizer.decode(ids)
            self._last = engine.global_steps, text
        return self._last[1]
