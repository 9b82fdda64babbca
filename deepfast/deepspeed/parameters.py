"""DeepSpeed's ``zero``: models made in parts, and parameters made whole for a while."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from deepfast.deepspeed.logs import warning_once
from deepfast.engine import config as configuration
from deepfast.engine.config import Config
from deepfast.engine.pieces import ZeroParamStatus
from deepfast.engine.ranks import init_distributed

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "register_external_parameter",
    "unregister_external_parameter",
]


class ZeroParamType(enum.Enum):
    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


def _stage(given: Any) -> int:
    """Of ZeRO; a configuration that says nothing of it has none."""
    if isinstance(given, Config):
        return given.zero_optimization.stage
    section = given.get("zero_optimization", {})
    return int(section.get("stage", 0)) if isinstance(section, dict) else int(section)


_made_by: list[Any] = []  # the context that is open, and those within it


class Init:
    """A context in which modules are made in parts: each rank keeps its rows of each weight, rank 0's values.

    Where there are several ranks, and the configuration, if one is given, says stage 3; elsewhere nothing happens.
    torch.distributed is started where torchrun has launched the process. Between this context and ``initialize``,
    weights are used within :class:`GatheredParameters`; ``load_state_dict`` and ``module.to`` work as ever.

    Args:
        module: is made already: it is cut here and now.
        data_parallel_group: None, or all ranks; so are the other groups and ``mpu``.
        config_dict_or_path, config: of ``initialize``.
        enabled: False: nothing happens.
        dtype, mem_efficient_linear: accepted. Types are set by ``initialize``, which keeps fp32 weights.
        remote_device, pin_memory, zero_quantized_weights and the like: have no effect, and a warning says so.

    Raises:
        ValueError: for a group of some ranks.
        ConfigError: for a configuration that cannot be read.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: Any = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        given = config_dict_or_path if config_dict_or_path is not None else config
        self.enabled = enabled and (given is None or _stage(configuration.given(given)) == 3)
        if not self.enabled:
            return
        unused = {
            "remote_device": remote_device not in (None, "none", "cpu"),
            "pin_memory": pin_memory,
            "zero_quantized_weights": zero_quantized_weights,
            "zero_quantized_nontrainable_weights": zero_quantized_nontrainable_weights,
            "param_swapper": param_swapper is not None,
        }
        for name in (name for name, is_set in unused.items() if is_set):
            warning_once(f"deepspeed.zero.Init: {name} has no effect")
        init_distributed()
        if mpu is not None:
            data_parallel_group = mpu.get_data_parallel_group()
        for group in (data_parallel_group, zero_param_parallel_group, sequence_data_parallel_group):
            if group is not None and dist.get_world_size(group) != dist.get_world_size():
                raise ValueError("deepspeed.zero.Init: weights are cut over all ranks; a group has only some of them")
        self.enabled = dist.is_initialized() and dist.get_world_size() > 1
        if self.enabled and module is not None:
            from deepfast.engine.born import cut

            cut(module)

    def __enter__(self) -> Init:
        if self.enabled:
            from deepfast.engine.born import Births

            context = Births() if not _made_by else None
            _made_by.append(context)
            if context is not None:
                context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.enabled:
            context = _made_by.pop()
            if context is not None:
                context.__exit__(*exception)


class GatheredParameters:
    """A context in which parameters that lie in parts are whole; all ranks enter and leave it.

    The parameters are the same objects as before, and ordinary tensors, on every rank. An engine's forward pass within
    the context uses what they were when it was entered. An exception leaves them as they were.

    Args:
        params: a parameter, or several; those that are whole anyway stay so.
        modifier_rank: at the end all ranks get what this rank has made of them.
            None: nobody has changed them, or all have in the same way; other changes are dropped, with a warning.
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
        self.params = [p for p in given if isinstance(p, Tensor)] if enabled else []
        self.modifier_rank = modifier_rank
        self._open: list[Any] = []

    def __enter__(self) -> None:
        if self.params and dist.is_initialized():
            from deepfast.engine.whole import Whole

            self._open.append(Whole(self.params))
            self._open[-1].open()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._open and not self._open.pop().close(self.modifier_rank, keep=kind is None):
            warning_once(
                "deepspeed.zero.GatheredParameters: ranks made different changes, which are dropped: set modifier_rank"
            )


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing: a parameter is there for whoever uses it."""


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing."""
