"""CUDA graphs: whether one is being captured."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
