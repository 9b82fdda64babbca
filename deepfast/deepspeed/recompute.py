"""DeepSpeed's ``checkpointing``: activations that are computed again in backward, by torch.utils.checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint as by_torch

from deepfast.deepspeed.devices import get_accelerator
from deepfast.deepspeed.logs import warning_once

_configured = False


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which only the inputs are kept for backward."""
    return by_torch(function, *args, use_reentrant=False, **kwargs)


non_reentrant_checkpoint = checkpoint


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Takes DeepSpeed's settings, which only tune memory; a warning says once that they do nothing."""
    global _configured  # noqa: PLW0603 - it is a question of the module
    _configured = True
    asked = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "profile": profile,
    }
    unused = [name for name, value in asked.items() if value]
    if unused:
        warning_once(f"deepspeed.checkpointing.configure: {', '.join(unused)} are not used: torch.utils.checkpoint is")


def is_configured() -> bool:
    return _configured


def reset() -> None:
    """Nothing: no buffers are kept."""


def set_num_layers(nlayers: int) -> None:
    """Nothing, for the same reason."""


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    configure(None, partition_activations=partition_activation)


class RandomStates:
    """Random states with names, as Megatron keeps them: one for what ranks share, and one for what they do not."""

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}

    def reset(self) -> None:
        self._states = {}

    def get_states(self) -> dict[str, Tensor]:
        return dict(self._states)

    def set_states(self, states: dict[str, Tensor]) -> None:
        self._states = states

    def add(self, name: str, seed: int) -> None:
        """A state that begins with ``seed``; the current one stays as it is.

        Raises:
            ValueError: if there is one of that name.
        """
        if name in self._states:
            raise ValueError(f"there is a random state {name!r} already")
        device = get_accelerator()
        current = device.get_rng_state()
        device.manual_seed(seed)
        self._states[name] = device.get_rng_state()
        device.set_rng_state(current)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """A context whose random numbers come from that state, which goes on where it has left off.

        Raises:
            KeyError: if there is none of that name.
        """
        device = get_accelerator()
        current = device.get_rng_state()
        device.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = device.get_rng_state()
            device.set_rng_state(current)


_states = RandomStates()


def get_cuda_rng_tracker() -> RandomStates:
    return _states


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seeds the device; the state for what ranks of one model do not share begins with ``seed`` + 2718."""
    _states.reset()
    get_accelerator().manual_seed(seed)
    _states.add("model-parallel-rng", seed + 2718)
