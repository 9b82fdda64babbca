"""Parameters that are cut over several ranks (DTensors): the kernels see each rank's shard."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor. (Importing its class would take longer than everything else here.)"""
    return hasattr(t, "_local_tensor")


def local(t: Any) -> Tensor:
    """This rank's shard of a DTensor, any other tensor itself.

    Not by ``to_local``, which makes a view at each call where the DTensor is a parameter.
    """
    shard = getattr(t, "_local_tensor", t)
    return shard.wait() if hasattr(shard, "wait") else shard  # gradients may still be on their way


def is_unit(module: Any) -> bool:
    """Whether ``fully_shard`` (FSDP2) has been called with this module."""
    return hasattr(type(module), "_get_fsdp_state")


def is_flat_shard(p: Any) -> bool:
    """Whether ``p`` is a part of what FSDP1 has flattened and cut: a plain tensor, whatever the other ranks hold."""
    return (
        getattr(p, "_fsdp_flattened", False)
        and not is_sharded(p)
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


_OF_ALL_RANKS = {
    "norm": ("the global gradient norm", "clip with the FSDP module's clip_grad_norm_()"),
    "overflow": ("the overflow of another rank", "scale with ShardedGradScaler of torch.distributed.fsdp"),
    "layer": ("the norm of a layer, which LAMB needs", "take another optimizer"),
}


def refuse_flat_shards(needed: str) -> NoReturn:
    what, instead = _OF_ALL_RANKS[needed]
    raise RuntimeError(
        f"deepfast: a rank cannot see {what} in the flat shards of FullyShardedDataParallel: {instead}, or shard with "
        "fully_shard (FSDP2)"
    )


class Shards(NamedTuple):
    """How a DTensor lies over the ranks."""

    mesh: Any
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, p: Tensor) -> Shards | None:
        return cls(p.device_mesh, p.placements) if is_sharded(p) else None  # type: ignore[attr-defined]

    def fit(self, t: Any) -> bool:
        mesh = t.device_mesh
        return (mesh is self.mesh or mesh == self.mesh) and t.placements == self.placements

    def local_grad(self, grad: Tensor) -> Tensor:
        """The shard of ``grad`` that belongs to the parameter's; partial sums are added up."""
        placed: Any = grad
        return local(grad if self.fit(grad) else placed.redistribute(self.mesh, self.placements))

    def wrap(self, shard: Tensor, like: Tensor) -> Tensor:
        """A DTensor of ``like``'s global shape around this rank's ``shard``, wherever that lies.

        Not by ``from_local``, which takes ten times as long, and would move it to the mesh's device: away from what
        fully_shard has offloaded to the CPU.
        """
        from torch.distributed.tensor import DTensor

        spec = like._spec  # type: ignore[attr-defined]
        if shard.dtype != like.dtype:
            spec = spec.shallow_copy_with_tensor_meta(spec.tensor_meta._replace(dtype=shard.dtype))
        return DTensor(shard, spec, requires_grad=False)

    def first(self, p: Any) -> int:
        """Where in the whole tensor the first element of this rank's shard is, row after row."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offsets = compute_local_shape_and_global_offset(p.shape, self.mesh, self.placements)
        return sum(offset * stride for offset, stride in zip(offsets, p.stride(), strict=True))

    def distribute(self, full: Tensor) -> Tensor:
        """Cuts a tensor that every rank has whole."""
        from torch.distributed.tensor import distribute_tensor

        if full.dtype == torch.int16:  # gloo scatters none
            full = full.int()
        return distribute_tensor(full, self.mesh, self.placements)

    def sum_(self, t: Tensor) -> Tensor:
        """Adds up a local figure over the ranks that hold different shards; replicas count once."""
        cut = (dimension for dimension, placement in enumerate(self.placements) if not placement.is_replicate())
        for group in groups_over(self.mesh, cut):
            dist.all_reduce(t, group=group)
        return t


def groups_over(mesh: Any, dimensions: Iterable[int]) -> list[Any]:
    """Groups to sum over one after the other, to have summed over these dimensions: one, where there is one of all.

    Making one would need all ranks of the world, which need not be here.
    """
    wide = [d for d in dimensions if mesh.size(d) > 1]
    if len(wide) > 1:
        size = math.prod(map(mesh.size, wide))
        if size == dist.get_world_size():
            return [dist.group.WORLD]
        at = mesh.get_coordinate()
        ranks = mesh.mesh[tuple(slice(None) if d in wide else at[d] for d in range(mesh.ndim))].flatten().sort().values
        for flat in mesh._get_root_mesh()._flatten_mapping.values():
            if flat.size() == size and flat.mesh.flatten().sort().values.equal(ranks):
                return [flat.get_group()]
    return [mesh.get_group(d) for d in wide]


def copy_into(kept: Tensor, value: Any) -> None:
    """``kept.copy_(value)`` where either may be a DTensor and the other a whole tensor."""
    value = torch.as_tensor(value)
    shards = Shards.of(kept)
    if shards is None and is_sharded(value):
        value = value.full_tensor()
    elif shards is not None and not is_sharded(value):
        value = shards.distribute(value.to(kept.device))
    kept.copy_(value)
