"""A stand-in for DTensors, and what every backend's plan does with parameters that are shards of some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

HYPER = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)  # SGD's
UNSEEN = -2


class Whole(Tensor):
    __slots__ = ("_local_tensor", "_spec")

    def __new__(cls, shard: Tensor, layout: Any) -> Whole:
        whole = Tensor._make_wrapper_subclass(cls, (2 * len(shard),), dtype=shard.dtype)
        whole._local_tensor, whole._spec = shard, layout
        return whole

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"nothing is computed of it: {func}")


def check_a_plan_of_shards(plan_of: Any) -> None:
    """Steps are counted, writes are noticed that only the DTensor knows of; gradients are found by their layout."""
    shards = [torch.full((5,), float(i + 1)).bfloat16() for i in range(3)]
    masters = [shard.float() for shard in shards]
    layouts: list[Any] = [object() for _ in shards]
    wholes: list[Any] = [Whole(shard, layout).requires_grad_() for shard, layout in zip(shards, layouts, strict=True)]
    plan = plan_of("sgd", shards, masters, [], [], torch.zeros(3, dtype=torch.int32))
    plan.shards_of(wholes)
    grads = [torch.ones(5).bfloat16() for _ in shards]

    def step(*given: Tensor | None) -> None:
        assert plan.gather(list(given), 0) == (sum(g is not None for g in given) or len(shards))
        plan.step(HYPER, [], torch.tensor([1.0, 0.0, 0.0]), None)

    def versions() -> list[int]:
        return [whole._version for whole in wholes]

    before = versions()
    step(*grads)
    assert versions() == [n + 1 for n in before]
    for shard in shards[:2]:
        shard.data.fill_(8.0)  # past autograd's eyes
    torch.autograd.graph.increment_version([wholes[0]])
    before = versions()
    step(*grads[:2], None)
    assert versions() == [before[0] + 1, before[1] + 1, before[2]]
    assert [shard[0].item() for shard in shards] == [7.5, 1.0, 2.5]
    step(*grads)  # and what the plan has written itself it knows
    assert [shard[0].item() for shard in shards] == [7.0, 0.5, 2.0]
    if not hasattr(plan, "expect"):
        return

    assert plan.gather([], 0) == UNSEEN, "nothing is expected so far"
    known = id(Whole), Whole.__basicsize__, id(layouts[0])
    with pytest.raises(RuntimeError, match="3 tensors of layouts expected, got 1"):
        plan.expect([0], *known)
    for whole, grad, layout in zip(wholes, grads, layouts, strict=True):
        whole.grad = Whole(grad.clone(), layout)
    plan.expect(list(map(id, layouts)), *known)
    step()
    assert [shard[0].item() for shard in shards] == [6.5, 0.0, 1.5]
    wholes[1].grad = None
    assert plan.gather([], 0) == 2
    for other in (Whole(grads[1], layouts[0]), Whole(torch.nn.Parameter(grads[1]), layouts[1])):
        wholes[1].grad = other
        assert plan.gather([], 0) == UNSEEN
    wholes[1].grad = Whole(grads[1], layouts[1])
    assert plan.gather([], 0) == 3
    wholes[1]._local_tensor = shards[1].clone()
    assert plan.gather([], 0) == UNSEEN
