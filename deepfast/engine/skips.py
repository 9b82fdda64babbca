"""Skipped steps: the loss scale moves on, one line says so, and an error when there is no use in going on."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from deepfast.engine import nonfinite
from deepfast.engine.config import Config
from deepfast.engine.config.schema import Fp16
from deepfast.engine.resume import Resumable
from deepfast.errors import LossScaleError

log = logging.getLogger("deepfast")

SCALED = torch.float16  # bf16's steps may be skipped, too
_ROOM = 36  # characters for names in an error that is to stay one line


class Skips:
    """What an engine does about inf and NaN in gradients.

    The host reads one number a step, whether it was skipped, and of a skipped step the scales besides. Without a loss
    scale nothing is skipped and nothing waited for: see :class:`NonFiniteSteps`.

    Attributes:
        nonfinite: steps that have taken inf or NaN into the weights.
    """

    def __init__(self, config: Config) -> None:
        self._limit = (config.fp16 or Fp16()).max_skips_at_minimum
        self._name = config.name_nonfinite
        self.nonfinite = nonfinite.NonFiniteSteps(config.name_nonfinite)
        self._in_a_row = 0  # skipped though the scale could not become smaller
        self._hopeless: LossScaleError | None = None

    def settle(self, engine: Resumable, norm: Tensor | None) -> bool:
        """After the optimizer's step, while its gradients are there: updates the scaler. Whether it was applied."""
        scaler = engine.scaler
        optimizer: Any = engine.optimizer
        found, scale = scaler.found_inf(optimizer), scaler.scale_of_this_step()
        scaler.update()
        if found is None or scale is None:
            self.nonfinite.heed(engine, norm)
            return True
        if not found.item():
            self._in_a_row = 0
            return True
        self._note(engine, float(scale))
        return False

    def check(self) -> None:
        """When the step is over, and the engine whole again.

        Raises:
            LossScaleError: on all ranks, if it was one skip too many; after as many more, again.
        """
        hopeless, self._hopeless = self._hopeless, None
        if hopeless is not None:
            raise hopeless

    def _note(self, engine: Resumable, scale: float) -> None:
        lowest = not engine.scaler.is_dynamic() or scale <= engine.scaler.get_min_scale()
        self._in_a_row = self._in_a_row + 1 if lowest else 0
        enough = self._in_a_row >= self._limit
        names = nonfinite.parameters(engine) if enough or self._name else []
        if engine.rank == 0:
            whose = nonfinite.first(names) if self._name else ""
            moved = f"; loss scale {scale:.10g} -> {engine.scaler.get_scale():.10g}" if engine.dtype == SCALED else ""
            log.warning("step %d skipped: inf or NaN in the gradients%s%s", engine.global_steps + 1, whose, moved)
        if enough:
            self._hopeless = _hopeless(self._in_a_row, scale, engine, names)
            self._in_a_row = 0


def _hopeless(skips: int, scale: float, engine: Resumable, names: list[str]) -> LossScaleError:
    shown = [repr(nonfinite.shortened(names[0], _ROOM))] if names else []
    for name in names[1:3]:
        if len(", ".join([*shown, repr(name)])) <= _ROOM:
            shown.append(repr(name))
    more = ", ..." if len(names) > len(shown) else ""
    whose = f"{len(names)} of {len(engine._names())} gradients ({', '.join(shown)}{more})" if names else "gradients"
    dynamic, scaled = engine.scaler.is_dynamic(), engine.dtype == SCALED
    at = f" at loss scale {scale:.6g} ({'the minimum' if dynamic else 'static'})" if scaled else ""
    instead = "fp32" if not scaled else "bf16, fp32" if dynamic else "a dynamic one, bf16, fp32"
    return LossScaleError(
        f"{skips} skips in a row{at}: inf or NaN in {whose}: look at the data, try {instead}, a lower lr", tuple(names)
    )
