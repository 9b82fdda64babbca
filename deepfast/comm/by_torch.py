"""Collectives by ``torch.distributed``: ranks on several hosts, or no kernels for peer memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast.comm.values import HALVES, check_pair, check_summed, tell

# Their names before torch 2.13.
gather_tensor = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter_tensor = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class ByTorch:
    """The same by ``torch.distributed`` on the group itself: ranks on several hosts, or no kernels for peer memory."""

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        self._group, self._size, self._device = group, size, device

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    def all_reduce_(self, t: Tensor, factor: float, statistics: Tensor | None, found_inf: Tensor | None) -> None:
        check_summed(t, factor)
        total = _wide(t, factor).contiguous()
        dist.all_reduce(total, group=self._group)
        t.copy_(total)
        tell(t, None, statistics, found_inf)

    def reduce_scatter(self, out: Tensor, t: Tensor, factor: float, statistics: Tensor | None,
                       found_inf: Tensor | None) -> None:  # fmt: skip
        check_summed(t, factor)
        check_pair(t, out, self._size, "reduce_scatter")
        whole = _wide(t, factor).contiguous().view(-1)
        part = torch.empty(out.numel(), dtype=whole.dtype, device=whole.device)
        scatter_tensor(part, whole, group=self._group)
        out.copy_(part.view(out.shape))
        tell(out, None, statistics, found_inf)

    def all_gather(self, out: Tensor, t: Tensor) -> None:
        check_summed(t, 1.0)
        check_pair(out, t, self._size, "all_gather")
        whole = torch.empty(out.numel(), dtype=t.dtype, device=t.device)
        gather_tensor(whole, t.contiguous().view(-1), group=self._group)
        out.copy_(whole.view(out.shape))

    def close(self) -> None:
        pass

    def check(self) -> None:
        pass


def _wide(t: Tensor, factor: float) -> Tensor:
    """What is summed: 16 bits as fp32; multiplied before, so that the mean of finite values is finite."""
    wide = t.float() if t.dtype in HALVES else t
    return wide * factor if factor != 1.0 else wide.clone()
