"""Whether a step is skipped, and what its gradients are multiplied by: decided on the device, before the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from deepfast import graphs, reference
from deepfast.optim.launch import Launch
from deepfast.optim.reach import Reach
from deepfast.optim.shards import is_sharded, refuse_flat_shards


def decide(optimizer: Any, launches: Sequence[Launch]) -> dict[torch.device, Tensor]:
    """Whether to skip, and what to multiply gradients by: a record for each device."""
    handed, max_norm = optimizer._shared, optimizer.defaults.get("max_grad_norm")
    grad_scale, found_inf = handed.get("grad_scale"), handed.get("found_inf")
    check = handed.get("_check_finite", False)
    home = launches[0].device
    statistics = None
    asked = max_norm is not None or check or optimizer._measure_norm
    if not asked and grad_scale is None and found_inf is None:
        return {launch.device: _as_they_are(launch.device) for launch in launches}
    if asked and any(launch.flat for launch in launches):
        refuse_flat_shards("overflow" if check else "norm")
    record = torch.empty(3, dtype=torch.float32, device=home)
    question = _on(grad_scale, home), _on(found_inf, home), max_norm or 0.0, check
    reach = _reach(optimizer) if asked else None
    alone = len(launches) == 1 and launches[0].gradients > 0 and not reach
    if asked and alone and optimizer._statistics is None:
        launches[0].decide(record, *question)
    else:
        if reach:
            statistics = reach.statistics(optimizer, launches, home)
        elif asked and optimizer._statistics is not None:
            statistics = optimizer._statistics.to(home)
        elif asked:
            parts = [launch.statistics().to(home) for launch in launches]
            statistics = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        backend = launches[0].backend if len(launches) == 1 else reference
        backend.decide_(record, statistics, *question)
    if asked:
        optimizer.grad_norm = record[2]
    optimizer._found_inf = record[1]
    return {launch.device: record.to(launch.device) for launch in launches}


def _reach(optimizer: Any) -> Reach | None:
    """That of the plan, as long as it is kept; None where it is this rank alone.

    Raises:
        RuntimeError: where an engine adds its parts up over groups of its own.
    """
    if optimizer._reach is None:
        optimizer._reach = Reach.of(optimizer)
    if not optimizer._reach.groups:
        return None
    if optimizer._parts is not None:
        raise RuntimeError(
            "deepfast: an engine that shards its optimizer knows no distinct_over(): choose zero_optimization stage 0"
        )
    return optimizer._reach


_RECORDS: dict[tuple[torch.device, int], Tensor] = {}


def _as_they_are(device: torch.device) -> Tensor:
    """The record of a step that neither scales nor clips nor skips."""
    # Another stream would not wait until it is filled.
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    real = _get_current_dispatch_mode() is None  # else the record may be fake, or fake parameters take no real one
    record = _RECORDS.get(key) if real else None
    if record is None:
        record = torch.zeros(3, dtype=torch.float32, device=device)
        record[:1].fill_(1.0)
        if real and not graphs.capturing(device):  # else it is filled when the graph runs
            _RECORDS[key] = record
    return record


def _on(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if is_sharded(value):
        value = value.full_tensor()  # type: ignore[union-attr]
    return torch.as_tensor(value, dtype=torch.float32, device=device)
