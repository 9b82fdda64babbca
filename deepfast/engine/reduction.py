"""How the gradients of an engine are summed, and who keeps what of them: chosen once, by where the ranks are."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfast import build
from deepfast.engine.owners import OwnedSums
from deepfast.engine.scattered import ScatteredSums
from deepfast.engine.shards import Shards
from deepfast.engine.sums import GradientSums
from deepfast.errors import ConfigError
from deepfast.optim import Optimizer
from deepfast.optim.shards import is_sharded

if TYPE_CHECKING:
    from deepfast.engine.units import Units

log = logging.getLogger("deepfast")


def communicator() -> Any:
    """For sums over the ranks; None where torch.distributed has to take them."""
    from deepfast.comm import Communicator

    try:
        return Communicator()
    except build.BuildError as error:
        log.warning("gradients are reduced by torch.distributed: %s", error)
        return None


class Reduction:
    """The sums of an engine's gradients, and, where it is sharded, its parts.

    Args:
        params: of the optimizer's groups, whole.
        stage: of ZeRO: 0, 1 or 2; of no meaning with
        units: of a module in parts.

    Attributes:
        sums: None where there is nothing to sum.
        shards: None where every rank keeps the whole state.
    """

    def __init__(
        self,
        params: list[Tensor],
        optimizer: torch.optim.Optimizer,
        stage: int,
        accumulation: int,
        units: Units | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._known = set(params)
        self.shards: Shards | None = None
        self.sums: Any = None
        self._comm: Any = None
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._units = units
        if units is not None:
            from deepfast.engine.fully_sharded import FullySharded

            self._comm = units.comm
            self.sums = FullySharded(params, units, self._comm, self._ranks)
        elif self._ranks > 1:
            self._start(params, stage)
        elif accumulation > 1:
            self.sums = GradientSums(params)

    def _start(self, params: list[Tensor], stage: int) -> None:
        _check(params, self._optimizer, stage)
        self._comm = comm = communicator()
        device = params[0].device
        reach = comm is not None and comm.reaches(device)
        if reach and device.type == "cpu":
            self.sums = OwnedSums(params, comm, sharded=stage > 0)
        elif stage == 0:
            self.sums = GradientSums(params, comm)
        else:
            self.sums = ScatteredSums(params, comm if device.type == "cuda" else None, stage)
        if stage > 0:
            self.shards = Shards(self.sums.comm, device, reach)
            self._cut(0)
            self._say(stage)

    def _cut(self, first: int) -> None:
        """Gives the optimizer this rank's parts instead of the parameters of buckets from ``first`` on."""
        shards, sums, optimizer = self.shards, self.sums, self._optimizer
        if shards is None:
            return
        shards.add(sums.params, sums.buckets.members[first:], sums.layouts[first:])
        for group in optimizer.param_groups:
            whole = group["params"]
            group["params"] = [shards.parts[p].mine if p in shards.parts else p for p in whole]
            for p in whole:
                if p in shards.parts and p in optimizer.state:
                    part = shards.parts[p]
                    state = optimizer.state.pop(p)
                    optimizer.state[part.mine] = {k: part.of(v) for k, v in state.items()}
        optimizer._parts = shards  # type: ignore[attr-defined]

    def heed(self, params: list[Tensor]) -> bool:
        """Before a step: takes in parameters that have come since, of groups added later. Whether there were any."""
        new = [p for p in params if p not in self._known]
        if not new:
            return False
        self._known.update(new)
        for p in new if self._ranks > 1 else ():
            if not is_sharded(p):
                dist.broadcast(p.data, 0)
        if isinstance(self.sums, GradientSums):
            self.sums = GradientSums(params, self._comm)
        elif self.sums is not None:
            first = 0 if self.shards is None else len(self.sums.buckets.members)
            self.sums.add_params(new)
            self._cut(first)
        return True

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Within, what gloo says when another host's rank has died becomes an error that names it."""
        try:
            yield
        except RuntimeError as error:
            if self._comm is not None and self.sums.comm is None and "gloo" in str(error):
                self._comm.all_reduce_(torch.zeros(1))  # which nobody can end: PeerTimeout
            raise

    def hand_over(self) -> None:
        """Makes the sums the gradients of what the optimizer steps."""
        if self.shards is None:
            self.sums.hand_over()
        else:
            parts = self.shards.parts
            self.sums.hand_over([parts[p].mine for p in self.sums.params])

    def close(self) -> None:
        """Leaves the ranks' common memory; the weights, and what the optimizer holds of them, move out before."""
        if self.shards is not None:
            self.shards.move_out()
        self.sums = None
        if self._units is not None:
            self._units.close()
        if self._comm is not None:
            self._comm.close()

    def _say(self, stage: int) -> None:
        layouts, ranks = self.sums.layouts, self.sums.ranks
        owned = [sum(end - begin for begin, end in (one.owned(r) for one in layouts)) for r in range(ranks)]
        numel = sum(p.numel() for p in self.sums.params)
        if dist.get_rank() == 0:
            kept = " to ".join(dict.fromkeys(map(_count, (min(owned), max(owned)))))
            log.info("ZeRO stage %d over %d ranks: all weights, and the state of %s of %s parameters, on each",
                     stage, ranks, kept, _count(numel))  # fmt: skip


def _count(numel: int) -> str:
    return f"{numel / 1e6:.3f}M"


def _check(params: list[Tensor], optimizer: torch.optim.Optimizer, stage: int) -> None:
    for p in params:
        if stage and is_sharded(p):
            raise ConfigError("zero_optimization.stage: a parameter is a DTensor, and sharded already: set it to 0")
    if stage and not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"zero_optimization.stage={stage}: {type(optimizer).__name__} cannot be sharded: take deepfast's, or "
            "torch's Adam, AdamW or SGD, which deepfast's replace; or set the stage to 0"
        )
