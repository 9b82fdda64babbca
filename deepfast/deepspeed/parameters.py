"""DeepSpeed's ``zero``: below stage 3 parameters are whole on every rank, and there is nothing to gather."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepfast.deepspeed.logs import warning_once


class ZeroParamStatus(enum.Enum):
    """Where a parameter is. Without stage 3 none has a ``ds_status`` that could be one of these."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(enum.Enum):
    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class Init:
    """A context in which DeepSpeed would make a model in parts; it is made whole, and a warning says so once.

    All of DeepSpeed's arguments are taken. Types and devices are set by ``initialize``, which also gives all ranks rank
    0's weights.
    """

    def __init__(self, module: nn.Module | None = None, *_args: Any, enabled: bool = True, **_options: Any) -> None:
        if enabled:
            warning_once("deepspeed.zero.Init: weights are whole on every rank (stage 3 is not built)")

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class GatheredParameters:
    """A context in which parameters are whole, as they always are.

    Args:
        params: a parameter, or several.
        modifier_rank: at the end all ranks get what this rank has made of them; all ranks enter and leave the context.
            None: nobody has changed them, or all have in the same way.
        fwd_module: accepted; parameters are where they are.
        enabled: False: nothing happens.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, Tensor) else params
        self.params = list(dict.fromkeys(p for p in given if isinstance(p, Tensor))) if enabled else []
        self.modifier_rank = modifier_rank

    def __enter__(self) -> None:
        pass

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None or self.modifier_rank is None or not dist.is_initialized():
            return
        for p in self.params:
            # Through a copy: an optimizer that keeps a master has to notice that somebody wrote.
            value = p.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(value, self.modifier_rank)
            if dist.get_rank() != self.modifier_rank:
                p.copy_(value)


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing: a parameter is there for whoever uses it."""


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing."""
