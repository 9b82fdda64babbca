"""ZeRO's stage 3: a module whose weights lie in parts over the ranks, by torch's ``fully_shard`` (FSDP2).

A unit's weights come together before its forward and its backward pass, and go apart after it; a gradient is summed
where its part lies. Between ranks both go by our collectives: in fp32 and in rank order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from deepfast import reference
from deepfast.comm.by_torch import gather_tensor, scatter_tensor
from deepfast.engine import born
from deepfast.errors import ConfigError
from deepfast.optim.shards import Shards, is_sharded, is_unit, local

log = logging.getLogger("deepfast")

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks(module: nn.Module, smallest: int) -> list[nn.Module]:
    """The members of lists (a transformer's layers) with at least ``smallest`` parameters; the outermost ones.

    Not what has no forward pass of its own, or shares a weight with others: that is the whole module's.
    """
    owners: dict[Tensor, set[nn.Module]] = {}
    for m in module.modules():
        for p in m.parameters(recurse=False):
            owners.setdefault(p, set()).add(m)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for holder in module.modules():
        for block in holder.children() if isinstance(holder, _LISTS) else ():
            held, own = set(block.modules()), list(block.parameters())
            large = sum(p.numel() for p in own) >= max(smallest, 1)
            called = type(block).forward is not nn.Module.forward and not isinstance(block, _LISTS[:2])
            if block not in inside and large and called and all(owners[p] <= held for p in own):
                found.append(block)
                inside |= held
    return found


class Units:
    """A module's units, and how they talk to the other ranks.

    Args:
        module: sharded in place: its parameters become DTensors of fp32, each rank's rows. What has no dimension to be
            cut along, or is no floating-point number, stays whole. One that the caller has sharded is left as it is.
        dtype: of the weights that forward and backward see.
        smallest: of how many parameters a block is a unit of its own; what is left is the module's.
        comm: a :class:`deepfast.comm.Communicator`, or None: torch.distributed.

    Attributes:
        by_caller: the caller has sharded it. torch then forms the mean over the ranks.
        renamed: the new parameters of those that were given.
        originals: fp32 values of parameters that stay whole, and have become 16 bits wide.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device, smallest: int, comm: Any) -> None:
        self.module, self.comm = module, comm
        self.by_caller = any(map(is_unit, module.modules()))
        self.renamed: dict[Tensor, Tensor] = {}
        self.originals: dict[Tensor, Tensor] = {}
        self._noticed: set[Tensor] = set()
        self.gather = Gather(comm, dtype if dtype == torch.float16 and device.type == "cpu" else None)
        self.scatter = Scatter(comm, self.gather.narrow)
        if not self.by_caller:
            self._shard(dtype, device, smallest)

    @torch.no_grad()
    def _shard(self, dtype: torch.dtype, device: torch.device, smallest: int) -> None:
        module = self.module
        before = dict(module.named_parameters())
        for name, p in before.items():
            if is_sharded(p):
                raise ConfigError(
                    f"zero_optimization.stage=3: the parameter {name!r} is a DTensor already: call fully_shard() "
                    "yourself, over both meshes"
                )
        whole = {p for p in before.values() if not (p.ndim and p.numel() and p.is_floating_point())}
        narrow = None if dtype == torch.float32 or self.gather.narrow else dtype
        policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for unit in (*blocks(module, smallest), module):
            for p in unit.parameters():
                if born.is_born(p):  # cut already
                    p.data = p.data.to(torch.float32)
                elif not is_sharded(p):
                    p.data = p.data.to(device, torch.float32 if p.is_floating_point() else None).contiguous()
                    dist.broadcast(p.data, 0)
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole & set(unit.parameters()))
        for unit in self.units():
            unit.set_custom_all_gather(self.gather)
            unit.set_custom_reduce_scatter(self.scatter)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            if hasattr(unit, "set_reduce_scatter_unused_params"):
                unit.set_reduce_scatter_unused_params(True)
        after = dict(module.named_parameters())
        self.renamed = {p: after[name] for name, p in before.items() if after[name] is not p}
        for p in whole:
            if p.is_floating_point() and dtype != torch.float32:
                self.originals[p], p.data = p.data, reference.round_master(p.data, dtype)
        born.settle(module, self.renamed, device)
        module.register_forward_hook(self._after_forward)
        self._say()

    @torch._disable_dynamo
    def _after_forward(self, *_: Any) -> None:
        """FSDP leaves the outermost unit whole for a backward pass. Where none follows, it goes apart, too: what is
        written to its parameters would be lost when it does."""
        if not torch.is_grad_enabled():
            self.apart()

    def _say(self) -> None:
        params = list(self.module.parameters())
        here, all_of_it = (sum(p.numel() for p in some) / 1e6 for some in (map(local, params), params))
        if dist.get_rank() == 0:
            log.info("ZeRO stage 3 over %d ranks: %.3fM of %.3fM parameters on each, in %d unit(s)",
                     dist.get_world_size(), here, all_of_it, len(self.units()))  # fmt: skip

    def units(self) -> list[Any]:
        return [m for m in self.module.modules() if is_unit(m)]

    def notice(self, used: Callable[[Tensor], None]) -> None:
        """From here on calls ``used`` with each parameter that a backward pass gives a gradient on this rank."""
        for unit in self.units():
            state = unit._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                for known in group.fsdp_params if group is not None else ():
                    t = getattr(known, "_unsharded_param", None)  # made when it is gathered first
                    if t is not None and t.requires_grad and t not in self._noticed:
                        self._noticed.add(t)
                        t.register_post_accumulate_grad_hook(lambda _, p=known.sharded_param: used(p))

    def apart(self) -> None:
        """Everything in parts again, what a forward pass has left whole, too."""
        for unit in self.units():
            unit.reshard()

    def renewed(self, groups: Iterable[Any]) -> list[Any]:
        """Parameters, or groups of them, with those that have taken their place."""
        return [
            {**g, "params": self.renewed(g["params"])} if isinstance(g, dict) else self.renamed.get(g, g)
            for g in groups
        ]

    def renew(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimizer the parts, and cuts what it has kept of the parameters so far."""
        for group in optimizer.param_groups:
            group["params"] = self.renewed(group["params"])
        for p, state in list(optimizer.state.items()):
            part = self.renamed.get(p)
            if part is not None and (shards := Shards.of(part)) is not None:
                del optimizer.state[p]
                optimizer.state[part] = {
                    k: shards.distribute(v) if isinstance(v, Tensor) and v.shape == p.shape else v
                    for k, v in state.items()
                }

    def close(self) -> None:
        """From here on torch.distributed is enough."""
        self.comm = self.gather.comm = self.scatter.comm = None


class _Collective:
    def __init__(self, comm: Any, narrow: torch.dtype | None) -> None:
        self.comm = comm
        self.narrow = narrow

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.comm is not None and device.type == "cpu":
            return self.comm.empty(math.prod(size), dtype, device)
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Collective):
    """A unit's weights, from all ranks. fp16 on a CPU: rounded to that, and computed with in fp32."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        if self.narrow is not None:
            input_tensor.copy_(reference.round_master(input_tensor, self.narrow))
        if self.comm is None:
            gather_tensor(output_tensor, input_tensor, group=group)
        else:
            self.comm.all_gather(output_tensor.view(self.comm.size, -1), input_tensor)


class Scatter(_Collective):
    """A unit's gradients, to the ranks that own them: the sum, in fp32.

    Attributes:
        weight: with which this rank's are multiplied.
    """

    weight = 1.0

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        if self.narrow is not None:
            input_tensor.copy_(input_tensor.to(self.narrow))  # what does not fit overflows, as it should
        if self.weight != 1.0:
            input_tensor.mul_(self.weight)
        if self.comm is None:
            scatter_tensor(output_tensor, input_tensor, group=group)
        else:
            self.comm.reduce_scatter(output_tensor, input_tensor.view(self.comm.size, -1))
