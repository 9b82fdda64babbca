"""Tensors of any layout, brought into one element order."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require

_OVERLAPS = 1  # what torch answers of a tensor whose elements share memory


class ElementOrder:
    """The twin of ``csrc/bindings/element_order.h``.

    A tensor that lies in another order than its parameter is copied, and what a kernel writes into the copy is copied
    back: a transposed gradient or a strided parameter is slower, never wrong.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shape: torch.Size = torch.Size()
        self._strides: tuple[int, ...] = ()
        self._copies: list[Tensor] = []
        self._written: list[tuple[Tensor, Tensor]] = []

    @property
    def copies(self) -> int:
        return len(self._copies)

    def follow(self, param: Tensor) -> None:
        """From here on, the order of ``param``: its own where it is dense in memory, else the contiguous one."""
        self._shape, self._strides = param.shape, param.stride()
        if not param.is_contiguous():
            # For a dense tensor these are its own.
            self._strides = torch.empty_like(param, device="meta").stride()

    def read(self, t: Tensor, what: str) -> int:
        """The address of ``t`` in this order."""
        require(
            t.device == self._device and t.layout == torch.strided,
            f"{what} must be a dense tensor on {self._device}, got {t.layout} on {t.device}",
        )
        require(t.shape == self._shape, f"{what} has shape {list(t.shape)}, its parameter {list(self._shape)}")
        if t.stride() == self._strides or t.numel() == 0:
            return t.data_ptr()
        self._copies.append(t.detach().new_empty_strided(self._shape, self._strides).copy_(t.detach()))
        return self._copies[-1].data_ptr()

    def write(self, t: Tensor, what: str) -> int:
        """Likewise of a tensor that will be written to."""
        require(
            t.is_contiguous() or torch._debug_has_internal_overlap(t) != _OVERLAPS,
            f"{what} of shape {list(t.shape)} is written to, but has elements that share memory (an expanded view?): "
            "clone() it",
        )
        before = self.copies
        address = self.read(t, what)
        if self.copies > before:
            self._written.append((t.detach(), self._copies[-1]))
        return address

    def write_back(self) -> None:
        for original, copy in self._written:
            original.copy_(copy)
