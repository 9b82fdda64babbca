"""The sums of stage 3: each rank has a part of every gradient, which ``fully_shard`` has summed over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from deepfast.engine.sums import GradientSums, Sums
from deepfast.errors import ConfigError
from deepfast.optim.shards import is_sharded, local

if TYPE_CHECKING:
    from deepfast.engine.units import Units


class FullySharded(Sums):
    """Micro-batches summed in fp32, as DTensors; between passes they are held here, not in ``p.grad``.

    Args:
        params: of the optimizer's groups. Those that are whole on every rank are summed beside them.
        comm: a communicator, or None: torch.distributed.
    """

    def __init__(self, params: list[Tensor], units: Units, comm: Any, ranks: int) -> None:
        self.units, self.comm, self.ranks = units, comm, ranks
        self.device = params[0].device
        self._whole: GradientSums | None = None
        self.params: list[Tensor] = []
        self.add_params(params)
        self.clear()

    def add_params(self, params: list[Tensor]) -> None:
        self.params = [*self.params, *params]
        whole = [p for p in self.params if not is_sharded(p)]
        if whole and self.units.by_caller:
            raise ConfigError(
                f"a parameter of shape {tuple(whole[0].shape)} is in no fully_shard module: nobody sums its gradients"
            )
        self._whole = GradientSums(whole, self.comm) if whole else None

    def clear(self) -> None:
        super().clear()
        self.held: dict[Tensor, Tensor] = {}
        self._used: set[Tensor] = set()  # by this rank; FSDP makes zeros for what only others have used
        if self._whole is not None:
            self._whole.clear()

    def expect(self, weight: float | None, times: float) -> None:
        """A pass begins whose gradients are multiplied so, before they are summed."""
        self.units.scatter.weight = times if weight is None else weight
        self.units.notice(self._note)

    def _note(self, p: Tensor) -> None:
        self._used.add(p)

    def begin(self, weight: float | None, last: bool, sync: bool = True, times: float = 1.0) -> None:
        """Before a pass: the sums lie where FSDP adds to them. (Or after it: they are added.)"""
        if weight is not None and self.units.by_caller:
            raise RuntimeError(
                "backward(): weight= needs ranks whose gradients are summed, and fully_shard averages them: let "
                "initialize() shard the module (zero_optimization.stage 3)"
            )
        self._adding = self._weigh(weight, times)
        self.expect(weight, times)
        for p, total in self.held.items():
            if p.grad is not None:
                local(total).add_(local(p.grad))
            p.grad = total
        self.held = {}
        if self._whole is not None:
            self._whole.begin(weight, last, sync, times)

    def add(self) -> None:
        """After it."""
        for p in self.params:
            if is_sharded(p) and p.grad is not None:
                self.held[p], p.grad = p.grad, None
        if self._whole is not None:
            self._whole.add()
        self._mark()
        self.weight += self._adding

    def _mark(self) -> None:
        whole = self._whole
        seen = {} if whole is None else dict(zip(whole.params, whole.present, strict=True))
        self.present = [seen.get(p, p in self._used) for p in self.params]

    def finish(self) -> None:
        """Before the step. (The optimizer looks at the gradients itself: their statistics are of many ranks' parts.)"""
        if self._whole is not None:
            self._whole.finish()
            self._mark()
        if self.ranks > 1:
            self._agree()

    def divisor(self, micro_batches: int) -> float:
        return super().divisor(micro_batches // self.ranks if self.units.by_caller else micro_batches)

    def hand_over(self) -> None:
        """Makes the sums the parameters' gradients; a parameter that no rank used has none."""
        for p, present in zip(self.params, self.present, strict=True):
            if is_sharded(p):
                p.grad = self.held.pop(p, None) if present else None
        if self._whole is not None:
            self._whole.hand_over()
