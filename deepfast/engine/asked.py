"""What scripts ask of an engine, and set, under DeepSpeed's names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from deepfast import reference
from deepfast.engine.checkpoint import CheckpointError, unique
from deepfast.engine.gradients import Gradients
from deepfast.engine.loader import micro_batches
from deepfast.engine.precision import Precision
from deepfast.engine.progress import Progress
from deepfast.engine.ranks import on_every_rank
from deepfast.engine.resume import Resumable, SharedCheckpointError
from deepfast.engine.skips import Skips
from deepfast.optim.shards import Shards, is_sharded

log = logging.getLogger("deepfast")


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")


class Number(float):
    """A number that can be called, too: here a property, in DeepSpeed a method."""

    def __call__(self) -> float:
        return float(self)


class Asked(Resumable):
    """The part of :class:`deepfast.Engine` that answers questions."""

    config: dict[str, Any]
    device: torch.device
    training_dataloader: DataLoader[Any] | None = None
    client_optimizer: Any = None
    client_lr_scheduler: Any = None
    _forward: Precision
    _progress: Progress
    _skips: Skips
    _applied: bool
    _grad_norm: Tensor | None

    def __getattr__(self, name: str) -> Any:
        """What the engine lacks the module may have, as in DeepSpeed: ``generate``, ``save_pretrained``, a layer."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise AttributeError(f"neither the engine nor its module has {name!r}") from error
            return getattr(module, name)

    def _trained(self) -> Gradients:
        if self._gradients is None:
            if self.optimizer is not None:
                raise RuntimeError("after destroy() the engine only runs forward: make another by initialize()")
            raise RuntimeError(
                "the engine has no optimizer and only runs forward: pass optimizer= to initialize(), or set one in the "
                "configuration"
            )
        return self._gradients

    # The step.

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._trained().at_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Whether the next ``step`` is an optimizer step, until this is called again; None: as counted."""
        self._trained().boundary = is_boundary

    def was_step_applied(self) -> bool:
        """Whether the last optimizer step was applied, not skipped for an overflow."""
        return self._applied

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, unscaled, before clipping; inf or NaN where it was skipped."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def get_lr(self) -> list[float]:
        return self._of_groups("lr")

    def get_mom(self) -> list[Any]:
        """Of each parameter group the momentum, or the betas."""
        groups = self._trained().optimizer.param_groups
        return [group["momentum"] if "momentum" in group else group.get("betas", 0.0) for group in groups]

    def get_type(self) -> list[Any]:
        return [group.get("type") for group in self._trained().optimizer.param_groups]

    def _of_groups(self, name: str) -> list[float]:
        return [float(group[name]) for group in self._trained().optimizer.param_groups]

    @property
    def loss_scale(self) -> Number:
        """With which the next loss is multiplied; DeepSpeed's ``loss_scale()`` is the same."""
        return Number(self.scaler.get_scale())

    def dynamic_loss_scale(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.is_dynamic()

    @property
    def skipped_steps(self) -> int:
        return self._skipped

    @property
    def nonfinite_steps(self) -> int:
        """Steps since this engine was made whose inf or NaN gradients nothing skipped: without loss scaling."""
        return self._skips.nonfinite.count()

    def steps_per_print(self) -> int | None:
        return self._config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        return self._config.wall_clock_breakdown

    def get_wall_clock_timers(self) -> dict[str, float]:
        """Milliseconds of the last step's "fwd", "bwd" and "step"; empty without ``wall_clock_breakdown``."""
        return dict(self._progress.phases)

    @property
    def global_samples(self) -> int:
        """Samples in all optimizer steps so far."""
        return self.global_steps * self.train_batch_size()

    def gradient_clipping(self) -> float:
        return self._config.gradient_clipping or 0.0

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Nothing: gradients are reduced while backward runs, or by ``step``."""

    # The batch.

    def train_batch_size(self) -> int:
        return self._config.batch_triple()[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._config.batch_triple()[1]

    def gradient_accumulation_steps(self) -> int:
        return self._config.batch_triple()[2]

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch, micro-batch, accumulation)"""
        return self._config.batch_triple()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Another accumulation, the micro-batch as it is; between two steps, or for the one that has begun.

        Raises:
            ValueError: for a size that micro-batch and ranks do not divide.
        """
        each = self.train_micro_batch_size_per_gpu() * self.world_size
        _check_whole("train_batch_size", train_batch_size)
        if train_batch_size < 1 or train_batch_size % each:
            raise ValueError(
                f"set_train_batch_size({train_batch_size}): it must be a multiple of micro-batch x ranks = {each}"
            )
        self._config.train_batch_size = train_batch_size
        self._config.gradient_accumulation_steps = train_batch_size // each
        if self._gradients is not None:
            self._gradients.accumulation = train_batch_size // each

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Another micro-batch, the accumulation as it is; who feeds the engine has to feed it so."""
        _check_whole("micro_batch_size", micro_batch_size)
        if micro_batch_size < 1:
            raise ValueError(f"set_train_micro_batch_size({micro_batch_size}): it must be positive")
        self._config.train_micro_batch_size = micro_batch_size
        self._config.train_batch_size = micro_batch_size * self.gradient_accumulation_steps() * self.world_size

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = False,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """A loader of micro-batches, each rank's its own share.

        Args:
            route: "train" shuffles; "eval" and "predict" do not.
            batch_size, data_sampler, collate_fn, num_local_io_workers, pin_memory: the loader's.
        """
        return micro_batches(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            shuffle=route == "train",
            sampler=data_sampler,
            collate_fn=collate_fn,
            num_workers=num_local_io_workers or 0,
            pin_memory=pin_memory,
            drop_last=self._config.dataloader_drop_last,
        )

    # Who and what.

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def global_rank(self) -> int:
        return self.rank

    @property
    def dp_world_size(self) -> int:
        return self.world_size

    @property
    def mp_world_size(self) -> int:
        return 1

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if dist.is_initialized() else None

    def fp16_enabled(self) -> bool:
        return self.dtype == torch.float16

    def bfloat16_enabled(self) -> bool:
        return self.dtype == torch.bfloat16

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """0: every rank keeps the whole state of the optimizer; 1 and 2: a part of it (and of the gradients' sums); 3:
        of the weights, too."""
        return self._config.zero_optimization.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() > 1

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() > 2

    def is_first_weights_partition_group(self) -> bool:
        return self.rank == 0

    def optimizer_name(self) -> str | None:
        """The type that the configuration names."""
        return None if self._config.optimizer is None else self._config.optimizer.type

    def scheduler_name(self) -> str | None:
        return None if self._config.scheduler is None else self._config.scheduler.type

    # The module.

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """The module's weights and buffers, whole, in the type that is computed with. At stage 3 all ranks call it."""
        return self._state_on(range(self.world_size), exclude_frozen_parameters)

    def _state_on(self, ranks: Iterable[int], exclude_frozen: bool = False) -> dict[str, Tensor]:
        """The same; empty on other ranks. One weight after the other comes together."""
        self._apart()
        frozen = {name for name, p in self.module.named_parameters() if exclude_frozen and not p.requires_grad}
        state = {}
        for name, t in self.module.state_dict().items():
            if name in frozen:
                continue
            if is_sharded(t):
                whole = t.full_tensor().to(self.device)
                narrow = whole.dtype == torch.float32 != self.dtype
                t = reference.round_master(whole, self.dtype) if narrow else whole
            if self.rank in ranks:
                state[name] = t
        return state

    @torch.no_grad()
    def load_module_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> None:
        """Into the weights; masters follow at the next step. At stage 3 all ranks call it, with whole tensors."""
        if self._units is not None:
            self._apart()
            own = self.module.state_dict()
            places = {name: Shards.of(own[name]) for name in state_dict.keys() & own.keys()}
            state_dict = {
                name: t if (shards := places.get(name)) is None or is_sharded(t) else shards.distribute(t.to(own[name]))
                for name, t in state_dict.items()
            }
        self.module.load_state_dict(state_dict, strict=strict)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """The module's weights, in the type that is computed with, as ``save_dir/save_filename``. All ranks call it.

        A name that ends with ``.safetensors`` gives such a file (tied weights once), any other a ``torch.save``.

        Raises:
            CheckpointError: on all ranks, if it cannot be written.
        """
        state = self._state_on([0], exclude_frozen_parameters)
        path = Path(save_dir) / save_filename

        def write() -> None:
            if self.rank > 0:
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".safetensors":
                    from safetensors.torch import save_file

                    save_file({k: t.contiguous() for k, t in unique(state).items()}, path, {"format": "pt"})
                else:
                    torch.save(state, path)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{path}: cannot be written: {error}") from error

        on_every_rank(write, SharedCheckpointError)
        return True

    save_fp16_model = save_16bit_model

    def consolidated(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """As :meth:`module_state_dict`, on rank 0; None on others. All ranks call it."""
        state = self._state_on([0], exclude_frozen_parameters)
        return state if self.rank == 0 else None

    _zero3_consolidated_16bit_state_dict = consolidated

    def compile(self, backend: Any = None, compile_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """torch.compile of the module, in place."""
        self.module.compile(**({} if backend is None else {"backend": backend}), **(compile_kwargs or {}))

    def empty_partition_cache(self) -> None:
        """At stage 3 weights that have come together go apart."""
        self._apart()

    def offload_states(self, *_: Any, **__: Any) -> None:
        """Nothing but a line: the state stays where it is."""
        log.warning("offload_states(): offloading is not built yet: the optimizer's state stays on %s", self.device)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Nothing: no state is ever offloaded."""

    def destroy(self) -> None:
        """Ends what the engine holds besides the module: a checkpoint being written, monitors, memory of all ranks.

        The module stays as it is; the engine trains no more. All ranks call it.
        """
        self.wait_for_checkpoint()
        self._progress.close()
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None
