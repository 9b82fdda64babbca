"""DeepSpeed's accelerator: the GPU as torch.cuda has it, or the CPU by the same names."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def total() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available() -> int:
    """Bytes of the host's memory that may still be taken."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


class Accelerator:
    """What both have. Device indices may be given where torch takes them.

    A method of DeepSpeed's that is not there is an AttributeError.
    """

    _name: str

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"deepfast's accelerator has no {name} on a {self._name}: call torch's for this")

    def device_name(self, device_index: int | None = None) -> str:
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def current_device(self) -> int:
        raise NotImplementedError

    def communication_backend_name(self) -> str:
        return "nccl" if self._name == "cuda" else "gloo"

    def is_available(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True  # on a CPU: 16-bit weights and gradients, arithmetic in fp32

    def is_fp64_supported(self) -> bool:
        return True

    def is_synchronized_device(self) -> bool:
        """Whether an operation has ended when its call returns."""
        return self._name == "cpu"

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    def random(self) -> Any:
        return torch.random

    def lazy_call(self, callback: Any) -> None:
        callback()

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._name

    def visible_devices_envs(self) -> list[str]:
        return ["CUDA_VISIBLE_DEVICES"]


class Cuda(Accelerator):
    """A GPU: what is not said here is torch.cuda's."""

    _name = "cuda"

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(torch.cuda, name)
        except AttributeError:
            return super().__getattr__(name)

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported()

    def amp(self) -> Any:
        return torch.cuda.amp

    def default_generator(self, device_index: int) -> torch.Generator:
        return torch.cuda.default_generators[device_index]

    def total_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[1]

    def available_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[0]

    def memory_cached(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_reserved(device_index)

    def max_memory_cached(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_reserved(device_index)

    def range_push(self, msg: str, *_: Any) -> None:
        torch.cuda.nvtx.range_push(msg)

    def range_pop(self, *_: Any) -> None:
        torch.cuda.nvtx.range_pop()

    def pin_memory(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()


class Cpu(Accelerator):
    """The CPU. Its memory is the process's resident pages; streams and ranges do nothing."""

    _name = "cpu"
    Stream, Event = torch.cpu.Stream, torch.cpu.Event
    stream = staticmethod(torch.cpu.stream)
    current_stream = default_stream = staticmethod(torch.cpu.current_stream)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    initial_seed = staticmethod(torch.initial_seed)
    FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
    DoubleTensor, LongTensor = torch.DoubleTensor, torch.LongTensor
    IntTensor, ByteTensor = torch.IntTensor, torch.ByteTensor

    def device(self, device_index: int | None = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_device(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def device_count(self) -> int:
        """Of those that share this host: its ranks."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def is_bf16_supported(self) -> bool:
        return True

    def amp(self) -> Any:
        return torch.cpu.amp

    def default_generator(self, device_index: int) -> torch.Generator:
        return torch.default_generator

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        torch.set_rng_state(new_state)

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    set_device = synchronize = empty_cache = range_push = range_pop = _nothing
    reset_peak_memory_stats = reset_max_memory_allocated = reset_max_memory_cached = _nothing

    def memory_allocated(self, device_index: int | None = None) -> int:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # counted less often
        return max(peak, self.memory_allocated())

    memory_reserved = memory_cached = memory_allocated
    max_memory_reserved = max_memory_cached = max_memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def total_memory(self, device_index: int | None = None) -> int:
        return total()

    def available_memory(self, device_index: int | None = None) -> int:
        return available()

    def pin_memory(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"


@functools.cache
def get_accelerator() -> Accelerator:
    """The GPU that torch can use, or else the CPU."""
    return Cuda() if torch.cuda.is_available() else Cpu()
